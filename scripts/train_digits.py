"""Train the embedded model: a small vision transformer for scikit-learn's handwritten digits, exported to ONNX.

    python scripts/train_digits.py [folder]

Writes `digits_vit.onnx`, the calibration and evaluation data with their labels, and prints the accuracy that ONNX
Runtime measures with the file. Neither part of the data is seen by the training: of the 1797 digits 1197 train the
model, 200 are for calibration and 400 for evaluation, drawn class by class.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lsp_deploy.console import progress, say
from lsp_deploy.export import INPUT_NAME, export_module, import_timm
from lsp_deploy.files import write_bytes, write_text
from lsp_deploy.model import save_model

ASSETS = Path(__file__).resolve().parents[1] / "lsp_deploy" / "assets"
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, MIXUP, SEED = 300, 64, 2e-3, 0.05, 0.4, 0


def main(folder: Path) -> None:
    """Split the digits, train, and write model and data to `folder`."""
    digits = load_digits()
    train, calibration, evaluation = split(digits.target)
    samples = normalized(digits.images, train)

    model = _train(samples[train], digits.target[train])
    save_model(export_module(model, samples.shape[1:]), folder / "digits_vit.onnx")
    for name, rows in (("calibration", calibration), ("evaluation", evaluation)):
        _write_data(folder, name, samples[rows], digits.target[rows])
        accuracy = _accuracy(folder / "digits_vit.onnx", samples[rows], digits.target[rows])
        say(f"{name}: {accuracy:.2%} of {len(rows)}")


def split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of the training, calibration and evaluation parts."""
    rest, evaluation = train_test_split(np.arange(len(labels)), test_size=400, stratify=labels, random_state=SEED)
    train, calibration = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=SEED)
    return train, calibration, evaluation


def normalized(images: NDArray[np.float64], train: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the digits as the model takes them, [samples, 1, 8, 8]: mean 0, deviation 1 over the training part."""
    pixels = images[:, None] / 16
    return ((pixels - pixels[train].mean()) / pixels[train].std()).astype(np.float32)


def _train(samples: NDArray[np.float32], labels: NDArray[np.int64]) -> torch.nn.Module:
    torch.manual_seed(SEED)
    # The same sums on any number of cores.
    torch.set_num_threads(1)
    model = import_timm().models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )
    x, y = torch.from_numpy(samples), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    share = torch.distributions.Beta(MIXUP, MIXUP)
    model.train()
    with progress("training", EPOCHS) as advance:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                _mixup_loss(model, _distorted(x[rows]), y[rows], share.sample()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            advance(1)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return model.eval()  # type: ignore[no-any-return]


def _mixup_loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on blends of two samples and their labels (Zhang et al., 2018)."""
    other = torch.randperm(len(x))
    logits = model(share * x + (1 - share) * x[other])
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    return share * loss(logits, y) + (1 - share) * loss(logits, y[other])


def _distorted(images: torch.Tensor) -> torch.Tensor:
    """Turn, scale, shear and move each image a little; the background fills the gap."""
    count, background = len(images), float(images.min())
    angle, shear = _uniform(math.radians(8), count), _uniform(0.1, count)
    scale, move = 1 + _uniform(0.08, 2, count), _uniform(0.15, 2, count)
    rows = [
        torch.stack([angle.cos() * scale[0], -angle.sin() * scale[0] + shear, move[0]], dim=1),
        torch.stack([angle.sin() * scale[1], angle.cos() * scale[1], move[1]], dim=1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images - background, grid, align_corners=False) + background


def _uniform(reach: float, *shape: int) -> torch.Tensor:
    return (torch.rand(shape) * 2 - 1) * reach


def _write_data(folder: Path, name: str, samples: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **{INPUT_NAME: samples})
    write_bytes(folder / f"{name}.npz", content.getvalue())
    rows = "".join(f"{row},{label}\n" for row, label in enumerate(labels))
    write_text(folder / f"{name}_labels.csv", f"filename,class_index\n{rows}")


def _accuracy(model: Path, samples: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT_NAME: samples})
    return float((logits.argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
