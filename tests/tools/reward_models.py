"""A family and a folder enter; a random reward model of it, as `transformers` saves one, leaves there with a tokenizer.

Scores differ from text to text by about 1. The tokenizer is made here: bytes and some merges, with a chat template or
without.
"""

from pathlib import Path

import jax

from mpo_jax.models import hf
from mpo_jax.stages import job as jobs
from tests.models.conftest import JSON
from tests.stages.ppo_job import STORIES

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A conversation ends with the token that ends turns, and nothing behind it."""
END, BEGIN, PAD = "<|im_end|>", "<|im_start|>", "<|pad|>"


def make(folder: Path, family: str, *, template: str = "", pad: str | None = PAD, labels: int = 1) -> Path:
    """A folder of a `...ForSequenceClassification`. pad: the token that its config names as padding."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = make_tokenizer(template)
    names = JSON[family] | {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 512, "n_positions": 512}
    config = AutoConfig.for_model(**names)
    config.num_labels = labels
    config.pad_token_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    config.bos_token_id = config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 if name == "score.weight" else weight.shape[-1] ** -0.5)
        model.score.weight *= model.score.weight.shape[-1] ** -0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(job, folder: Path) -> Path:
    """A folder of the reward model that a job has, with the tokenizer of the run: as somebody else's."""
    with jax.set_mesh(job.mesh):
        model = jobs.model(job)
        weights = jobs.load_weights(job, job.inputs["reward"], model)
        hf.export_weights(folder, model, weights, job.config.model.path, head=True)
    return folder


def make_tokenizer(template: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        STORIES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters, show_progress=False)
    )
    made.add_special_tokens([BEGIN, END, PAD])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = template or None
    return tokenizer


def judged(folder: Path, ids: list[list[int]]) -> list[float]:
    """The scores of `transformers`, each sequence by itself."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([each])).logits[0, 0].item() for each in ids]
