"""Train the embedded model: a small vision transformer for scikit-learn's handwritten digits, exported to ONNX.

    python scripts/train_digits.py [folder]

Writes `digits_vit.onnx`, the calibration and evaluation data with their labels, and prints the accuracy that ONNX
Runtime measures with the file. Neither part of the data is seen by the training: of the 1797 digits 1197 train the
model, 200 are for calibration and 400 for evaluation, drawn class by class.
"""

from __future__ import annotations

import io
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
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 300, 64, 1e-3, 0.05, 0


def main(folder: Path) -> None:
    """Split the digits, train, and write model and data to `folder`."""
    digits = load_digits()
    pixels = (digits.images[:, None] / 16).astype(np.float32)
    rest, evaluation = train_test_split(np.arange(1797), test_size=400, stratify=digits.target, random_state=SEED)
    train, calibration = train_test_split(rest, test_size=200, stratify=digits.target[rest], random_state=SEED)
    mean, std = pixels[train].mean(), pixels[train].std()
    samples = ((pixels - mean) / std).astype(np.float32)

    model = _train(samples[train], digits.target[train])
    save_model(export_module(model, samples.shape[1:]), folder / "digits_vit.onnx")
    for name, rows in (("calibration", calibration), ("evaluation", evaluation)):
        _write_data(folder, name, samples[rows], digits.target[rows])
        accuracy = _accuracy(folder / "digits_vit.onnx", samples[rows], digits.target[rows])
        say(f"{name}: {accuracy:.2%} of {len(rows)}")


def _train(samples: NDArray[np.float32], labels: NDArray[np.int64]) -> torch.nn.Module:
    torch.manual_seed(SEED)
    model = import_timm().models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, drop_path_rate=0.1
    )
    x, y = torch.from_numpy(samples), torch.from_numpy(labels)
    steps = EPOCHS * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    with progress("training", EPOCHS) as advance:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                loss(model(_shift(x[rows])), y[rows]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            advance(1)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return model.eval()  # type: ignore[no-any-return]


def _shift(images: torch.Tensor) -> torch.Tensor:
    """Move each image by up to one pixel in each direction; the border's colour fills the gap."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    rows, columns = torch.randint(0, 3, (2, len(images), 1))
    reach = torch.arange(8)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, 0, (rows + reach)[:, :, None], (columns + reach)[:, None, :]][:, None]


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
