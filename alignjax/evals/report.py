"""Table 5 of the report: accuracy in %, zero-shot and few-shot (MMLU 5, C-Eval 5, GSM8K 8, BBH 3; HumanEval has none).

The baselines come, the report says, from their own reports and from OpenCompass.
"""

COLUMNS = (
    ("mmlu", "zero"),
    ("mmlu", "few"),
    ("ceval", "zero"),
    ("ceval", "few"),
    ("gsm8k", "zero"),
    ("gsm8k", "few"),
    ("humaneval", "zero"),
    ("bbh", "zero"),
    ("bbh", "few"),
)
ROWS = """
GPT-3.5             -    69.1 -    52.5 -    78.2 73.2 -    70.1
GPT-4               -    83.0 -    69.9 -    91.4 86.6 -    86.7
ChatGLM2-6B         45.5 46.0 50.1 52.6 -    28.8 11.0 -    32.7
InternLM-Chat-7B    -    51.1 -    53.6 -    33.0 14.6 -    32.5
Baichuan2-Chat-7B   -    52.9 -    55.6 -    32.8 13.4 -    35.8
Baichuan2-Chat-13B  -    57.3 -    56.7 -    55.3 17.7 -    49.9
Llama-2-Chat-7B     -    46.2 -    31.9 -    26.3 12.2 -    35.6
Llama-2-Chat-13B    -    54.6 -    36.2 -    37.1 18.9 -    40.1
Llama-2-Chat-70B    -    63.8 -    44.3 -    59.3 32.3 -    60.8
Qwen-Chat-1.8B      42.4 43.9 50.7 50.3 27.8 19.5 14.6 27.1 25.0
Qwen-Chat-7B        55.8 57.0 59.7 59.3 50.3 54.1 37.2 39.6 46.7
Qwen-Chat-14B       64.6 66.5 69.8 71.7 60.1 59.3 43.9 46.9 58.7
"""

# model -> (benchmark, setting) -> figure, where the report gives one
REPORT = {
    model: {column: float(x) for column, x in zip(COLUMNS, figures, strict=True) if x != "-"}
    for model, *figures in map(str.split, ROWS.strip().splitlines())
}
