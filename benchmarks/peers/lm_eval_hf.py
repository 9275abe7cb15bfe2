"""lm-evaluation-harness' own `hf` model on requests from a file: python lm_eval_hf.py CHECKPOINT REQUESTS OUT BATCH

Prints a JSON line of seconds by kind of request; OUT gets the answers. Wants torch, transformers and lm_eval.
"""

import json
import sys
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

checkpoint, requests, out, batch = sys.argv[1:]
model = HFLM(pretrained=checkpoint, dtype="float32", device="cpu", batch_size=int(batch))
torch.set_grad_enabled(False)
answers, seconds = {}, {}
with open(requests, encoding="utf-8") as file:
    asked = json.load(file)
for name, (kind, arguments) in asked.items():
    instances = [Instance(kind, {}, tuple(args), i) for i, args in enumerate(arguments)]
    before = time.perf_counter()
    answers[name] = getattr(model, kind)(instances, disable_tqdm=True)
    seconds[name] = time.perf_counter() - before
with open(out, "w", encoding="utf-8") as file:
    json.dump(answers, file)
print(json.dumps(seconds))
