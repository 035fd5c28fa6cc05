"""A Llama's sizes enter; seconds of a DPO step, a reward step or of generation by PyTorch and transformers leave.

What a good loop of one's own does: bfloat16 autocast over float32 weights, SDPA, logits of the reply alone, fused
AdamW, clipped gradients, torch.compile where it works. Each reply with its prompt is a row, as such loops have them.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from run_scripts.benchmarks.programs import KV_HEADS, SHAPES, VOCABULARIES, VOCABULARY


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=("dpo", "reward", "sample"), required=True)
    parser.add_argument("--shape", required=True)
    for name, default in (("rows", 8), ("prompt", 512), ("response", 512), ("runs", 3), ("compile", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = ""
    try:
        found = measured(given, device, bool(given.compile))
    except Exception as error:  # whatever torch.compile dislikes on this machine
        if not given.compile:
            raise
        failed = type(error).__name__
        print(f"torch.compile: {failed}: {str(error)[:300]}", flush=True)
    if failed:  # only here is the error gone, and with it the models that its traceback held
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = measured(given, device, False) | {"compile_error": failed}
    given.json.write_text(json.dumps(found))
    return 0


def measured(given, device: str, compiled: bool) -> dict:
    torch.manual_seed(0)
    once, tokens = {"dpo": dpo, "reward": reward, "sample": sample}[given.what](given, device, compiled)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    began = time.perf_counter()
    once()
    wait()
    first = time.perf_counter() - began
    once()
    wait()
    samples = []
    for _ in range(given.runs):
        began = time.perf_counter()
        once()
        wait()
        samples.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / (1 << 20) if device == "cuda" else None
    best = statistics.median(samples)
    return {
        "best": best,
        "tokens_per_second": tokens / best,
        "first_seconds": first,
        "samples": samples,
        "device_peak_MiB": peak,
        "compiled": compiled,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def llama(given, device: str, dtype=torch.float32):
    width, layers, heads, mlp = SHAPES[given.shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS.get(given.shape, heads),
        vocab_size=VOCABULARIES.get(given.shape, VOCABULARY),
        max_position_embeddings=max(512, given.prompt + given.response),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def dpo(given, device: str, compiled: bool):
    """The reference's log-probs of a batch of pairs and a train step on it, as `programs.dpo_step` does."""
    policy, reference = llama(given, device), llama(given, device, torch.bfloat16).eval()
    ids = torch.randint(5, VOCABULARY, (2 * given.rows, given.prompt + given.response), device=device)

    def logps(model, ids):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, given.prompt - 1 : -1]
        logits = model.lm_head(hidden).flatten(0, 1)
        found = -F.cross_entropy(logits.float(), ids[:, given.prompt :].flatten(), reduction="none")
        return found.view(ids.shape[0], -1).sum(-1)

    score = torch.compile(logps, dynamic=False) if compiled else logps

    def loss():
        with torch.no_grad(), autocast(device):
            before = score(reference, ids)
        with autocast(device):
            chosen, rejected = (score(policy, ids) - before).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return training(policy, loss), 2 * given.rows * (given.prompt + given.response)


def reward(given, device: str, compiled: bool):
    policy = llama(given, device)
    head = torch.nn.Linear(SHAPES[given.shape][0], 1, bias=False, device=device)
    ids = torch.randint(5, VOCABULARY, (2 * given.rows, given.prompt + given.response), device=device)

    def scores(ids):
        return head(policy.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])[:, 0].float()

    score = torch.compile(scores, dynamic=False) if compiled else scores

    def loss():
        with autocast(device):
            chosen, rejected = score(ids).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return training(torch.nn.ModuleList([policy.model, head]), loss), 2 * given.rows * (given.prompt + given.response)


def sample(given, device: str, compiled: bool):
    """`generate` with a static cache, which it compiles by itself, or a growing one."""
    model = llama(given, device, torch.bfloat16).eval()
    ids = torch.randint(5, VOCABULARY, (given.rows, given.prompt), device=device)
    lengths = {"max_new_tokens": given.response, "min_new_tokens": given.response}
    options = {"cache_implementation": "static"} if compiled else {}

    def once():
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **lengths, **options)

    return once, given.rows * given.response


def training(module, loss):
    parameters = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def once():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
