"""Megatron's own ``pretrain`` on live rollouts; the script that test_live_rollouts.py starts.

    torchrun ... -m megatron_tropd.integrations.on_cpu tests/live_pretrain.py MEGATRON ARGUMENTS

With LIVE (a JSON object: student, prompts, out, and optionally responses, engines, fail, distil) in
the environment. Every last stage writes what it saw to ``out``; with distil, where the plug-in
trains, the weights and the rollouts of every step are written.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.training import argument_utils, arguments, pretrain

from examples.megatron_lm.pretrain_gpt import model_provider
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.sequence import Writer
from megatron_tropd.integrations import megatron_lm as tropd
from megatron_tropd.integrations.on_policy_data import OnPolicyData, OnPolicySettings
from megatron_tropd.integrations.on_policy_iterator import OnPolicyIterator
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.export import save_hf
from megatron_tropd.mcore.layout import current_layout

LIVE = json.loads(os.environ["LIVE"])
OUT = Path(LIVE["out"])


def loss_func(batch, step, losses):
    """Cross entropy of the rollouts; records how far Megatron and the engine disagree."""
    student = batch["writers"] == Writer.STUDENT
    record = {
        "step": step,
        "gap": (losses.detach() + batch["behaviour_logprobs"])[student].abs().max().item(),
        "student": int(student.sum()),
        "teacher": int((batch["writers"] == Writer.TEACHER).sum()),
        "ids": batch["sample_key"].tolist(),
        "labels": batch["labels"].sum(dim=1).tolist(),
    }
    with (OUT / f"rank_{dist.get_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    weights = batch["weights"]
    loss, count = (losses * weights).sum(), weights.sum()
    return loss, count.to(torch.int), {"lm loss": torch.stack([loss.detach(), count])}


def forward_step(data_iterator, model, *, live):
    """A step function like any other, that fails when it is told to."""
    if live.step == LIVE.get("fail"):
        raise RuntimeError("told to fail")
    batch = next(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    if not parallel_state.is_pipeline_last_stage():
        return losses, None
    return losses, partial(loss_func, batch, live.step - 1)


def settings() -> OnPolicySettings:
    """What is sampled."""
    return OnPolicySettings(
        student=Path(LIVE["student"]),
        rollout=RolloutConfig(
            prompts=LIVE["prompts"],
            max_new_tokens=12,
            prompts_per_step=2,
            samples_per_prompt=4,
            engine_cpu_kv_gib=0.25,
            num_engines=LIVE.get("engines", 1),
        ),
        guidance=GuidanceConfig(responses=LIVE.get("responses")),
        log_folder=OUT,
    )


def recording(rollouts):
    """Rollouts for the plug-in that also leave weights and items of every step in ``out``."""

    def call(model, iteration):
        items = rollouts(model, iteration)
        hf = HFFolder(LIVE["student"])
        save_hf(DenseModel([model], hf.config, current_layout()), hf, OUT / f"step_{iteration}")
        if dist.get_rank() == 0:
            torch.save(items, OUT / f"items_{iteration}.pt")
        return items

    return call


def no_datasets(num_samples):
    """Training data that nobody reads."""
    return iter(()), None, None


def main() -> None:
    """Train on live rollouts, as a step function of one's own does or as the plug-in does."""
    args = arguments.parse_and_validate_args(tropd.add_arguments, args_defaults={})
    run = partial(
        pretrain,
        cfg_container=argument_utils.pretrain_cfg_container_from_args(args),
        model_type=ModelType.encoder_or_decoder,
    )
    with OnPolicyData(settings()) as rollouts:
        if LIVE.get("distil"):
            no_datasets.is_distributed = True
            with tropd.distillation(recording(rollouts)):
                run(
                    train_valid_test_dataset_provider=no_datasets,
                    model_provider=model_provider,
                    forward_step_func=tropd.distilling(forward_step),
                )
            return
        live = OnPolicyIterator(rollouts)
        run(
            train_valid_test_dataset_provider=live.datasets_provider,
            model_provider=live.watch_model(model_provider),
            forward_step_func=live.watch_steps(partial(forward_step, live=live)),
        )


if __name__ == "__main__":
    main()
