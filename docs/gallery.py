"""Draws the pictures of docs/how-to/schedule-gallery.md: ``make gallery``."""

from pathlib import Path

from PIL import Image

from lightning_ema.cli.plot import plot_schedules
from lightning_ema.schedules.text import read_schedule

STEPS = 1000
PICTURES = Path(__file__).parent / "images" / "schedules"
GALLERY = {
    "Constant": ["Constant(0.99)", "Constant(0.999)"],
    "Warmup": ["Warmup(0.98)", "Warmup(0.999)"],
    "HalfLife": ["HalfLife(steps=50)", "HalfLife(steps=200)"],
    "Annealing": ["Annealing(0.995, gamma=1)", "Annealing(0.995, gamma=10)"],
    "ExponentialAnnealing": ["ExponentialAnnealing(0.99, gamma=200)", "ExponentialAnnealing(0.99, gamma=50, offset=1)"],
    "Cosine": ["Cosine(0.9, 1.0, total_steps=1000)", "Cosine(0.99, 1.0, total_steps=1000)"],
    "InversePower": ["InversePower(0.9999)", "InversePower(0.9999, power=1.0)"],
    "Power": ["Power(sigma_rel=0.05)", "Power(sigma_rel=0.1)", "Power(sigma_rel=0.2)"],
    "Equal": ["Equal()"],
    "Debiased": ["Debiased(0.99)", "Debiased(0.999)"],
    "Then": ["Then(0.9, at=500, second=0.995)", "Then(0.0, at=500, second=Equal())"],
    "Shifted": ["Shifted(Warmup(0.999), by=0)", "Shifted(Warmup(0.999), by=500)"],
    "Scaled": ["Scaled(0.999, batch_factor=1)", "Scaled(0.999, batch_factor=8)"],
    "PerUpdate": ["PerUpdate(0.9)", "PerUpdate(0.98)"],
    "Bema": ["Bema()", "Bema(kappa=0.7)"],
}
"""What each picture shows, by the schedule it is of."""
EVERY = {"PerUpdate": 5}
"""Steps between updates, where that is not 1."""


def picture(name: str) -> Path:
    """Where the picture of a schedule lies."""
    return PICTURES / f"{name}.png"


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, texts in GALLERY.items():
        schedules = {text: read_schedule(text) for text in texts}
        path = plot_schedules(schedules, STEPS, picture(name), EVERY.get(name, 1), inches=(8, 3.2))
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size
        print(path)


if __name__ == "__main__":
    main()
