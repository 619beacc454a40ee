"""What trainers evaluate, save and hand over: the averaged weights, while the weights in training go on bit for bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from integration_trainers import launched
from problems import criterion, data, new_model, whole
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

import gen_dist as gen
from gen_dist.integrations.averages import RateAndAverages
from gen_dist.integrations.horizon import with_horizon

pytestmark = pytest.mark.filterwarnings("ignore")
Weights = dict[str, Tensor]
STEPS = 8


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


def contents(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ transformers


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Samples(Dataset[Any]):
    def __init__(self, count: int = 64) -> None:
        draw = torch.Generator().manual_seed(2)
        self.x = torch.randn(count, 6, generator=draw)
        self.y = (self.x[:, :3] * 2 + 0.5 * torch.randn(count, 3, generator=draw)).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


def hugging_face(
    folder: Path | str, steps: int = STEPS, scheduler: Any = None, callbacks: Any = (), **more: Any
) -> Any:
    from transformers import TrainingArguments

    from gen_dist.integrations.transformers import GenTrainer

    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return GenTrainer(
        model=Classifier(),
        args=TrainingArguments(**settings | more),
        train_dataset=Samples(),
        eval_dataset=Samples(16),
        callbacks=list(callbacks),
        scheduler=scheduler,
    )


def loss_of(weights: Weights) -> float:
    model = Classifier()
    model.load_state_dict(weights)
    samples = Samples(16)
    with torch.no_grad():
        return model(samples.x, samples.y)["loss"].item()


def looking(into: dict[int, tuple[Weights, Weights]]) -> Any:
    """A callback that keeps the weights in training and the averaged ones, after each step."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scheduler = kwargs["lr_scheduler"].scheduler
            into[state.global_step] = contents(kwargs["model"]), scheduler.averaged_state_dict()

    return Look()


def saved_in(folder: Path, step: int) -> Weights:
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


@needs("transformers", "accelerate")
@pytest.mark.parametrize("horizon", [True, False])
def test_evaluations_and_checkpoints_have_the_averaged_weights(horizon: bool, tmp_path: Path) -> None:
    seen: dict[int, tuple[Weights, Weights]] = {}
    scheduler = None if horizon else partial(gen.AutoGen, total_steps=None)
    trainer = hugging_face(tmp_path, scheduler=scheduler, callbacks=[looking(seen)])
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    for step in (2, 4, 6, 8):
        in_training, averaged = seen[step]
        assert equal(saved_in(tmp_path, step), averaged)
        assert evaluated[step] == pytest.approx(loss_of(averaged), rel=1e-5)
        assert equal(in_training, averaged) == (horizon and step == STEPS)
    assert equal(contents(trainer.model), seen[STEPS][1]), "and at the end they stay in the model"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(seen[STEPS][1]), rel=1e-5)


@needs("transformers", "accelerate")
def test_the_evaluation_changes_nothing_in_training(tmp_path: Path) -> None:
    ends = []
    for often in (1, 100):
        seen: dict[int, tuple[Weights, Weights]] = {}
        trainer = hugging_face(tmp_path, eval_steps=often, save_strategy="no", callbacks=[looking(seen)])
        trainer.train()
        ends.append(seen[STEPS - 1][0])
    assert equal(*ends)


@needs("transformers", "accelerate")
@pytest.mark.parametrize("horizon", [True, False])
def test_a_resumed_run_goes_on_bitwise(horizon: bool, tmp_path: Path) -> None:
    scheduler = partial(gen.AutoGen, **({"total_steps": STEPS} if horizon else {"total_steps": None}))
    whole: dict[int, tuple[Weights, Weights]] = {}
    hugging_face(tmp_path / "a", scheduler=scheduler, callbacks=[looking(whole)]).train()
    hugging_face(tmp_path / "b", steps=4, scheduler=scheduler).train()
    resumed: dict[int, tuple[Weights, Weights]] = {}
    hugging_face(tmp_path / "b", scheduler=scheduler, callbacks=[looking(resumed)]).train(resume_from_checkpoint=True)
    assert list(resumed) == [5, 6, 7, 8]
    for step, (in_training, averaged) in resumed.items():
        assert equal(in_training, whole[step][0])
        assert equal(averaged, whole[step][1])


@needs("transformers", "accelerate")
def test_the_best_model_is_the_one_evaluated(tmp_path: Path) -> None:
    """By a metric that is best in the middle of the run."""
    seen: dict[int, tuple[Weights, Weights]] = {}
    trainer = hugging_face(
        tmp_path,
        callbacks=[looking(seen)],
        load_best_model_at_end=True,
        metric_for_best_model="distance",
        greater_is_better=False,
    )
    evaluate = trainer.evaluation_loop

    def with_distance(*args: Any, **kwargs: Any) -> Any:
        output = evaluate(*args, **kwargs)
        output.metrics["eval_distance"] = abs(trainer.state.global_step - 4)
        return output

    trainer.evaluation_loop = with_distance
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert equal(contents(trainer.model), seen[4][1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(seen[4][1]), rel=1e-5)


@needs("transformers", "accelerate")
def test_a_run_that_stops_early_hands_the_average_over(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            exported.update(contents(kwargs["model"]))

    exported: Weights = {}
    seen: dict[int, tuple[Weights, Weights]] = {}
    trainer = hugging_face(tmp_path, callbacks=[looking(seen), Stop()])
    trainer.train()
    assert equal(exported, seen[5][1])
    assert equal(contents(trainer.model), seen[5][1])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # once more, with the same trainer
    assert equal(exported, seen[5][1])


@needs("transformers", "accelerate")
def test_a_scheduler_without_averages_is_left_alone(tmp_path: Path) -> None:
    trainer = hugging_face(tmp_path, scheduler=partial(gen.ExactGen, lr_max=0.1))
    trainer.train()
    assert equal(contents(trainer.model), saved_in(tmp_path, STEPS))


# --------------------------------------------------------------------------------------------------- Lightning


WITHOUT_HORIZON = partial(gen.AutoGen, total_steps=None)


class Watched(NamedTuple):
    """What a run of Lightning saw at each step: the weights in training, the averaged ones, and validation losses."""

    in_training: dict[int, Weights]
    averaged: dict[int, Weights]
    validated: dict[int, float]


def lightning(
    folder: Path,
    epochs: int = 4,
    scheduler: Any = WITHOUT_HORIZON,
    resume: Path | None = None,
    stop: int = 0,
    callbacks: Any = (),
    **options: Any,
) -> tuple[Any, Any, Watched]:
    """Fit a module of two batches an epoch, with a validation after each; the trainer, the module and what it saw."""
    import lightning as L
    from torch.utils.data import DataLoader

    from gen_dist.integrations.lightning import GenCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch)["loss"]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.model(**batch)["loss"]
            self.log("val_loss", loss)
            self.log("distance", abs(float(trainer.current_epoch) - 1))
            if not trainer.sanity_checking:
                seen.validated[trainer.global_step] = loss.item()

        def on_train_batch_end(self, *_: Any) -> None:
            seen.in_training[trainer.global_step] = contents(self.model)
            seen.averaged[trainer.global_step] = {
                name.removeprefix("model."): value
                for name, value in gen_callback.scheduler.averaged_state_dict().items()
            }
            trainer.should_stop = trainer.global_step == stop

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    seen = Watched({}, {}, {})
    gen_callback = GenCallback(scheduler)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, gen_callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": bool(callbacks), **options},
    )
    module = Module()
    loaders = DataLoader(Samples(), batch_size=32), DataLoader(Samples(16), batch_size=16)
    trainer.fit(module, *loaders, ckpt_path=resume)
    return trainer, module, seen


def best_in(folder: Path, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(dirpath=folder, filename="{step}", **options)


def module_in(checkpoint: Path | str) -> Weights:
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    return {name.removeprefix("model."): value for name, value in saved.items()}


@needs("lightning")
@pytest.mark.parametrize("horizon", [True, False])
def test_lightning_validates_and_saves_the_averaged_weights(horizon: bool, tmp_path: Path) -> None:
    saves = best_in(tmp_path, save_top_k=-1)
    scheduler = None if horizon else WITHOUT_HORIZON
    _, module, seen = lightning(tmp_path, scheduler=scheduler, callbacks=[saves])
    for step in (2, 4, 6, 8):
        assert equal(module_in(tmp_path / f"step={step}.ckpt"), seen.averaged[step])
        assert seen.validated[step] == pytest.approx(loss_of(seen.averaged[step]), rel=1e-5)
        assert equal(seen.in_training[step], seen.averaged[step]) == (horizon and step == STEPS)
    assert equal(contents(module.model), seen.averaged[STEPS])


@needs("lightning")
def test_lightning_validation_changes_nothing_in_training(tmp_path: Path) -> None:
    often, never = lightning(tmp_path)[2], lightning(tmp_path, limit_val_batches=0)[2]
    assert not never.validated
    assert equal(often.in_training[STEPS], never.in_training[STEPS])


@needs("lightning")
@pytest.mark.parametrize("when", ["at the end of an epoch", "after fit"])
def test_lightning_resumes_bitwise(when: str, tmp_path: Path) -> None:
    whole = lightning(tmp_path)[2]
    saves = [best_in(tmp_path, save_top_k=-1)] if when != "after fit" else []
    trainer, *_ = lightning(tmp_path, epochs=2, callbacks=saves)
    checkpoint = tmp_path / "step=4.ckpt"
    if not saves:
        trainer.save_checkpoint(checkpoint)
    *_, resumed = lightning(tmp_path, resume=checkpoint)
    assert sorted(resumed.in_training) == [5, 6, 7, 8]
    for step, weights in resumed.in_training.items():
        assert equal(weights, whole.in_training[step])
        assert equal(resumed.averaged[step], whole.averaged[step])


@needs("lightning")
def test_the_best_checkpoint_of_lightning_is_the_one_validated(tmp_path: Path) -> None:
    """By a metric that is best after the second of four epochs."""
    best = best_in(tmp_path, monitor="distance", mode="min")
    trainer, module, seen = lightning(tmp_path, callbacks=[best])
    assert equal(module_in(best.best_model_path), seen.averaged[4])
    trainer.validate(module, torch.utils.data.DataLoader(Samples(16), batch_size=16), ckpt_path="best", verbose=False)
    assert equal(contents(module.model), seen.averaged[4])


@needs("lightning")
def test_lightning_hands_over_the_average_when_it_stops_early(tmp_path: Path) -> None:
    _, module, seen = lightning(tmp_path, scheduler=None, stop=3)
    assert max(seen.averaged) == 3
    assert not equal(seen.in_training[3], seen.averaged[3])
    assert equal(contents(module.model), seen.averaged[3])


@needs("lightning")
def test_an_error_in_a_validation_leaves_the_weights_in_training(tmp_path: Path) -> None:
    import lightning as L

    class Fails(L.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                modules.append(pl_module)
                raise ArithmeticError("in the validation")

    modules: list[Any] = []
    whole = lightning(tmp_path)[2]
    with pytest.raises(ArithmeticError):
        lightning(tmp_path, callbacks=[Fails()], enable_checkpointing=False)
    assert equal(contents(modules[0].model), whole.in_training[4])
    assert torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------- on ranks


def on_ranks(folder: str, steps: int, resume: bool) -> tuple[list[float], dict[int, tuple[Weights, Weights]]]:
    """The evaluated losses and the weights of a run in DDP."""
    with launched():
        seen: dict[int, tuple[Weights, Weights]] = {}
        options = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
        scheduler = partial(gen.AutoGen, total_steps=None)
        trainer = hugging_face(folder, steps, scheduler, [looking(seen)], **options)
        trainer.train(resume_from_checkpoint=resume or None)
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry], seen


@needs("transformers", "accelerate")
def test_two_ranks_evaluate_the_averages_and_resume_bitwise(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    whole = pool(2).run(on_ranks, str(tmp_path / "whole"), STEPS, False)
    pool(2).run(on_ranks, str(tmp_path / "cut"), 4, False)
    resumed = pool(2).run(on_ranks, str(tmp_path / "cut"), STEPS, True)
    for (losses, seen), (_, again) in zip(whole, resumed, strict=True):
        for step, loss in zip((2, 4, 6, 8), losses, strict=True):
            averaged = {name.removeprefix("module."): value for name, value in seen[step][1].items()}
            assert loss == pytest.approx(loss_of(averaged), rel=1e-5)
            assert equal(saved_in(tmp_path / "whole", step), averaged)
        assert sorted(again) == [5, 6, 7, 8]
        for step, (in_training, averages) in again.items():
            assert equal(in_training, seen[step][0])
            assert equal(averages, seen[step][1])


def sharded_run() -> dict[str, Any]:
    """Two steps of a sharded model; what its trainer evaluates, saves and hands over."""
    model = new_model()
    fully_shard(model)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters())
    rate = RateAndAverages(gen.AutoGen(optimizer, model, criterion))
    x, y = data()[0]
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        rate.batches.append((x, y))
        optimizer.step()
    in_training, averages = whole_weights(model), rate.scheduler.averaged_state_dict()
    with rate.result_in_place(), rate.result_in_place():
        evaluated = whole_weights(model)
    with rate.checkpointed():
        checkpointed = whole_weights(model)
    after, state = whole_weights(model), rate.state_dict()
    rate.end()
    return {
        "averages": {name: whole(value) for name, value in averages.items()},
        "in training": in_training,
        "evaluated": evaluated,
        "checkpointed": checkpointed,
        "after": after,
        "handed over": whole_weights(model),
        "saved": (state["average"], state["training_weights"]),
    }


def whole_weights(model: nn.Module) -> Weights:
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def test_a_sharded_model_is_evaluated_and_handed_over_as_its_average(pool: Callable[[int], Pool]) -> None:
    """A trainer's checkpoint, saved on one rank, has no place for shards of others."""
    for seen in pool(2).run(sharded_run):
        assert equal(seen["evaluated"], seen["averages"])
        assert equal(seen["checkpointed"], seen["averages"])
        assert equal(seen["handed over"], seen["averages"])
        assert equal(seen["after"], seen["in training"])
        assert not equal(seen["averages"], seen["in training"])
        assert seen["saved"] == (None, None)


# -------------------------------------------------------------------------------------------------- the horizon


class Mine(gen.AutoGen):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def by_hand(optimizer: gen.GenOptimizer, model: nn.Module, total_steps: int) -> gen.GenScheduler:
    return gen.AutoGen(optimizer, model, total_steps=total_steps)


def without(optimizer: gen.GenOptimizer, model: nn.Module) -> gen.GenScheduler:
    return gen.AutoGen(optimizer, model)


@pytest.mark.parametrize(
    ("factory", "steps"),
    [
        (None, 100),
        (gen.AutoGen, 100),
        (Mine, 100),
        (by_hand, 100),
        (without, None),
        (partial(gen.AutoGen, update_every=4), 100),
        (partial(Mine, update_every=4), 100),
        (partial(gen.AutoGen, total_steps=7), 7),
        (partial(gen.AutoGen, total_steps=None), None),
        (partial(gen.AutoGen, rule=gen.Auto(creep=0.1)), 100),
        (partial(gen.AutoGen, rule=gen.Auto(total_steps=7)), 7),
        (lambda optimizer, model: gen.AutoGen(optimizer, model), None),
    ],
)
def test_a_factory_gets_the_horizon_where_it_takes_it(factory: Any, steps: int | None) -> None:
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler: Any = with_horizon(factory, 100)(optimizer, model)
    assert scheduler.rule.total_steps == steps
    scheduler = with_horizon(factory, None)(optimizer, model) if factory is not by_hand else scheduler
    assert scheduler.rule.total_steps in (steps, None)


@pytest.mark.parametrize("factory", [gen.ExactGen, partial(gen.ApproxGen, probes=1)])
def test_a_factory_without_a_horizon_stays_as_it_is(factory: Callable[..., gen.GenScheduler]) -> None:
    assert with_horizon(factory, 100) is factory
