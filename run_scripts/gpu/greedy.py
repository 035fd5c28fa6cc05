"""An exported policy's folder enters; how many greedy replies of ours and of transformers are equal leaves, as JSON.

float32 in both, with products of full precision: by TF32 or bfloat16 two tokens of nearly equal chance change places.
"""

import json
import sys

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mpo_jax import sampling
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.models import hf
from mpo_jax.models.config import from_folder

PROMPTS = ["Once upon a time", "The", "One day, a little girl", "Tom and his dog"]
TOKENS = 32


def main(folder: str) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tokenizer, config = load_tokenizer(folder), from_folder(folder)
    weights, stops = hf.import_weights(folder, config), hf.read_stop_ids(folder)
    settings = sampling.SamplingConfig(temperature=0.0, max_new_tokens=TOKENS, stop_ids=stops)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    equal, differing = 0, []
    for prompt in PROMPTS:
        batch = prompt_batch([prompt], tokenizer)
        with jax.default_matmul_precision("highest"):
            drawn = list(sampling.stream(config, settings, weights, batch, 0, 0, TOKENS))[-1]
        mine = drawn[0][0, 0, : drawn[1][0, 0]].tolist()
        ids = torch.tensor(np.asarray(batch.tokens)).long().to(device)
        with torch.no_grad():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                eos_token_id=list(stops), pad_token_id=0,
            )  # fmt: skip
        theirs = whole[0, ids.shape[1] :].tolist()
        equal += mine == theirs
        if mine != theirs:
            differing.append(f"{tokenizer.decode(mine)!r} against {tokenizer.decode(theirs)!r}")
    note = f"{jax.devices()[0].device_kind} and torch on {device}" + "".join(f"; {each}" for each in differing)
    print(json.dumps({"equal": equal, "of": len(PROMPTS), "note": note}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
