"""Log-probs of pairs or of labelled replies enter; what TRL's own trainers make of them leaves, with its gradients.

TRL computes its losses inside its trainers. Here a trainer's method is called on a stand-in for the trainer, whose
"model" gives the log-probs as they are: no line of TRL's arithmetic is written again.
"""

import collections
import os
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class _Accelerator:
    device = "cpu"

    def gather_for_metrics(self, x):
        return x

    gather = unwrap_model = gather_for_metrics


def _metrics() -> Any:
    """What TRL logs into: name -> values, for train and for eval."""
    return collections.defaultdict(lambda: collections.defaultdict(list))


def _model(torch, log_probs) -> Any:
    """A model whose outputs are these log-probs [rows, T], whatever it is asked."""
    nothing = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=torch.zeros(log_probs.shape, dtype=torch.bool),
    )

    class Model:
        training = False

        def __call__(self, **_):
            return outputs

        def modules(self):
            return []

    return Model()


def _mask(torch, lens) -> Any:
    """bool [rows, 1 + longest]: a prompt's token, then each reply's."""
    columns = torch.arange(1 + int(max(lens)))[None]
    return (columns >= 1) & (columns <= torch.as_tensor(lens)[:, None])


def _per_token(torch, sums, lens, mask) -> Any:
    """Log-probs [rows, longest] that sum to `sums`: each reply's are alike."""
    share = sums / torch.as_tensor(lens, dtype=sums.dtype)
    return share[:, None] * mask[:, 1:]


def dpo(torch, loss_type: str, arrays, lens, beta: float, label_smoothing: float = 0.0):
    """`DPOTrainer`'s mean loss of pairs, and its gradients by the four log-probs. lens: tokens of chosen, rejected."""
    from trl.trainer.dpo_trainer import DPOTrainer

    leaves = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in arrays]
    both = np.concatenate(lens)
    mask = _mask(torch, both)
    policy = _per_token(torch, torch.cat(leaves[:2]), both, mask)
    trainer = SimpleNamespace(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        label_smoothing=label_smoothing, loss_types=[loss_type], loss_weights=[1.0], use_weighting=False,
        accelerator=_Accelerator(), model=SimpleNamespace(training=False), _metrics=_metrics(), _tp_size=1,
        _total_train_tokens=0, args=None,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": mask.long(),
        "completion_mask": mask.long(), "ref_chosen_logps": leaves[2], "ref_rejected_logps": leaves[3],
    }  # fmt: skip
    return _backward(DPOTrainer._compute_loss(trainer, _model(torch, policy), inputs, False), leaves)


def cpo(torch, loss_type: str, chosen, rejected, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0):
    """`CPOTrainer`'s mean loss, without its likelihood term, and its gradients by the two given."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    leaves = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in (chosen, rejected)]
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=_Accelerator(), loss_type=loss_type, beta=beta, simpo_gamma=gamma,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return _backward(CPOTrainer.cpo_loss(trainer, *leaves)[0].mean(), leaves)


def orpo(torch, chosen, rejected, beta: float):
    """`ORPOTrainer`'s mean of beta * log sigmoid(log odds ratio), and its gradients. In float32, as TRL casts it."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    leaves = [torch.tensor(np.asarray(each), requires_grad=True) for each in (chosen, rejected)]
    trainer = SimpleNamespace(accelerator=_Accelerator(), beta=beta)
    return _backward(ORPOTrainer.odds_ratio_loss(trainer, *leaves)[0].mean(), leaves)


def kto(torch, policy, reference, other_policy, other_reference, desirable, beta, weights):
    """`KTOTrainer`'s mean loss of labelled replies, and its gradients by `policy` and `reference`. other_*: of replies
    to other prompts. weights: of desirable and of other replies."""
    from trl.trainer.kto_trainer import KTOTrainer

    given = (policy, reference, other_policy, other_reference)
    leaves = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in given]
    mask = _mask(torch, [1] * len(policy))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=_Accelerator(), aux_loss_enabled=False, loss_type="kto",
        precompute_ref_logps=True, calculate_KL=True, beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], _metrics=_metrics(), _tp_size=1, _total_train_tokens=0,
        _compute_kl_logps=lambda model, batch: leaves[2],
    )  # fmt: skip
    inputs = {
        "label": torch.tensor(np.asarray(desirable)), "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": mask.long(), "completion_mask": mask.long(), "ref_logps": leaves[1],
        "ref_KL_logps": leaves[3],
    }  # fmt: skip
    return _backward(KTOTrainer._compute_loss(trainer, _model(torch, leaves[0][:, None]), inputs, False), leaves[:2])


def _backward(loss, leaves):
    """The value, and the gradients by the leaves, as NumPy."""
    loss.backward()
    return loss.item(), [np.zeros(len(leaf)) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
