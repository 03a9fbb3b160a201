"""Train a model by a framework, in each process that torchrun starts, or in this one alone.

python framework_training.py FRAMEWORK FOLDER writes what rank r ends with to FOLDER/r.pt.
"""

import os
import pathlib
import sys

import torch
from torch import Tensor

from triton_syncbn import SyncBN, convert_sync_batchnorm

STEPS = 2
LEARNING_RATE = 0.1


class Model(torch.nn.Module):
    """Returns loss and logits, as a Trainer of transformers asks for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(4, 2)
        self.double()

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(images).mean((2, 3)))
        return torch.nn.functional.cross_entropy(logits, labels), logits


def samples() -> list[dict[str, Tensor]]:
    """A whole batch. Each of two ranks takes a half of it, whichever: the mean is the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
    return [{"images": image, "labels": torch.tensor(i % 2)} for i, image in enumerate(images)]


def loader(size: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(samples(), batch_size=size)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE)


def one_process(folder: str) -> Model:
    model = Model()
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        for batch in loader(16):
            optimizer.zero_grad()
            model(**batch)[0].backward()
            optimizer.step()
    return model


def accelerate(folder: str) -> Model:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = convert_sync_batchnorm(Model())
    wrapped, optimizer, data = accelerator.prepare(model, optimizer_of(model), loader(8))
    for _ in range(STEPS):
        for batch in data:
            optimizer.zero_grad()
            accelerator.backward(wrapped(**batch)[0])
            optimizer.step()
    return model


def transformers(folder: str) -> Model:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        num_train_epochs=STEPS,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = convert_sync_batchnorm(Model())
    Trainer(model, arguments, train_dataset=samples()).train()
    return model


def lightning(folder: str) -> Model:
    from lightning.pytorch import LightningModule, Trainer

    from triton_syncbn.lightning import SyncBNPlugin

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            assert isinstance(self.model.body[1], SyncBN)
            return self.model(**batch)[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    module = Module()
    Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=STEPS,
        plugins=[SyncBNPlugin()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader(8))
    assert type(module.model.body[1]) is torch.nn.BatchNorm2d
    return module.model


if __name__ == "__main__":
    name, target = sys.argv[1:]
    trained = globals()[name](target)
    torch.save(trained.state_dict(), pathlib.Path(target) / f"{os.environ.get('RANK', 0)}.pt")
