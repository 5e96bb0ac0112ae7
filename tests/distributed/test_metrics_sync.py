"""Two real processes, joined by gloo through a file: every metric gives the value over all data on both of them."""

import json

import pytest
import torch
import torch.distributed as dist
from two_processes import forks

from lightning_ema import PseudoLabelAcceptance, PseudoLabelAccuracy, RelativeWeightDistance, TeacherStudentAgreement

ONE_HOT = torch.eye(3)
EXPECTED = {"rate": 2 / 5, "accuracy": 2 / 3, "agreement": 3 / 4, "distance": (30 / 50) ** 0.5, "nothing": 0.0}


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metrics = {
        "rate": PseudoLabelAcceptance(),
        "accuracy": PseudoLabelAccuracy(),
        "agreement": TeacherStudentAgreement(),
        "distance": RelativeWeightDistance(),
        "nothing": PseudoLabelAccuracy(),
    }
    labels = torch.tensor([0, 1, 2])
    metrics["nothing"].update(labels, labels > 2, labels)
    if rank == 0:
        metrics["rate"].update(torch.tensor([True]))
        metrics["accuracy"].update(labels, labels < 2, torch.tensor([0, 2, 0]))
        metrics["agreement"].update(ONE_HOT, ONE_HOT[[0, 1, 0]])
        metrics["distance"].update([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 2.0]) - torch.tensor([1.0, 0.0])])
    else:
        metrics["rate"].update(torch.tensor([True, False, False, False]))
        metrics["accuracy"].update(labels[:1], labels[:1] == 0, labels[:1])
        metrics["agreement"].update(ONE_HOT[:1], ONE_HOT[:1])
        metrics["distance"].update([torch.tensor([5.0])], [torch.tensor([0.0])])
    values = {name: metric.compute().item() for name, metric in metrics.items()}
    (folder / f"{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def test_metrics_of_two_processes_give_the_value_over_all_data(tmp_path):
    forks()  # what is imported is imported once
    torch.multiprocessing.start_processes(run, (tmp_path,), nprocs=2, start_method="forkserver")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(EXPECTED)
