"""Answer requests from a file with lm-evaluation-harness' own `hf` model.

usage: python lm_eval_hf.py CHECKPOINT REQUESTS OUT BATCH

Prints a JSON line with the seconds of each kind of request; the answers go to OUT. Needs torch,
transformers and lm_eval.
"""

import json
import sys
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

checkpoint, requests_file, out, batch = sys.argv[1:]
model = HFLM(pretrained=checkpoint, dtype="float32", device="cpu", batch_size=int(batch))
torch.set_grad_enabled(False)
with open(requests_file, encoding="utf-8") as file:
    requests = json.load(file)
answers = {}
seconds = {}
for name, (kind, arguments_of_all) in requests.items():
    instances = [
        Instance(kind, {}, tuple(arguments), number)
        for number, arguments in enumerate(arguments_of_all)
    ]
    start = time.perf_counter()
    answers[name] = getattr(model, kind)(instances, disable_tqdm=True)
    seconds[name] = time.perf_counter() - start
with open(out, "w", encoding="utf-8") as file:
    json.dump(answers, file)
print(json.dumps(seconds))
