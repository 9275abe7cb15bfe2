"""Hold the figures that the Qwen report publishes: its Table 4 and its Table 5, in %."""

# Accuracy on sets of comparisons: of the pretrained preference model (PMP), and of the reward
# model (RM).
TABLE_4 = {
    "hh_helpful_base": {"PMP": 76.52, "RM": 73.98},
    "hh_helpful_online": {"PMP": 65.43, "RM": 64.57},
    "summarize": {"PMP": 69.60, "RM": 69.99},
    "shp": {"PMP": 60.05, "RM": 60.10},
    "prm800k": {"PMP": 70.59, "RM": 70.52},
}

# Accuracy on benchmarks, zero-shot and few-shot (MMLU 5, C-Eval 5, GSM8K 8, BBH 3; HumanEval has
# no few-shot setting). The report says that the baselines come from their own reports and from
# OpenCompass.
TABLE_5_COLUMNS = (
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
TABLE_5_ROWS = """
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


def parse_row(row: str) -> tuple[str, dict[tuple[str, str], float]]:
    """Return a row's model and its figures by (benchmark, setting); "-" is no figure."""
    model, *cells = row.split()
    columns = zip(TABLE_5_COLUMNS, cells, strict=True)
    return model, {column: float(cell) for column, cell in columns if cell != "-"}


# {model: {(benchmark, setting): figure}}
TABLE_5 = dict(map(parse_row, TABLE_5_ROWS.strip().splitlines()))
