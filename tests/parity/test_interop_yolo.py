"""Files of ultralytics and yolov5, trained by their own models and losses and saved by their own calls."""

import contextlib
import copy
import types

import packages
import pytest
import torch
import yaml
from helpers import clones, ema, engine, equal, trainer
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_ema import WeightAverage, interop, recipes
from lightning_ema.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages and a Trainer have to say of themselves

STEPS, MORE, RATE = 4, 3, 0.01
BEFORE = 4000  # updates that the average has behind it already; with none its decay would be below 0.01 here


def batches(first, count):
    """Images of 64 x 64 pixels with a box each."""
    for n in range(first, first + count):
        generator = torch.Generator().manual_seed(n)
        yield {
            "img": torch.rand(2, 3, 64, 64, generator=generator),
            "batch_idx": torch.tensor([0.0, 1.0]),
            "cls": torch.tensor([[0.0], [1.0]]),
            "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.4, 0.6, 0.3, 0.5]]),
        }


def halves(state):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def narrow(layout):
    """The layout of its smallest model with less channels."""
    layout["nc"] = 2
    if "scales" in layout:
        layout["scales"] = {"n": [0.33, 0.0625, 64]}
    else:
        layout["width_multiple"] = 0.03125
    return layout


class Ultralytics:
    """A run of its trainer, as far as average and files go; data and evaluation are left out."""

    system = "ultralytics"

    def __init__(self, folder):
        package = packages.ultralytics()
        torch.manual_seed(1)
        self.model = package.DetectionModel(narrow(package.yaml_model_load("yolov8n.yaml")), verbose=False)
        self.model.args = package.get_cfg()
        self.trainer = run = object.__new__(package.BaseTrainer)
        run.model, run.device, run.args = self.model, torch.device("cpu"), self.model.args
        run.optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        run.scaler = torch.amp.GradScaler("cuda", enabled=False)
        run.ema = package.ModelEMA(self.model, updates=BEFORE)
        run.epoch, run.save_period, run.metrics, run.fitness, run.best_fitness = 0, -1, {}, 0.5, 0.5
        run.stopper = types.SimpleNamespace(best_fitness=0.5, best_epoch=0)
        run.wdir, run.last, run.best = folder, folder / "last.pt", folder / "best.pt"
        run.read_results_csv = dict

    ema = property(lambda self: self.trainer.ema)

    def loss(self, model, batch):
        return model(batch)[0].sum()

    def train(self, first, count):
        for batch in batches(first, count):
            self.loss(self.model, batch).backward()
            self.trainer.optimizer_step()
            yield

    def save(self):
        self.trainer.save_model()
        return self.trainer.last

    def resume(self, file):
        content = torch.load(file, weights_only=False)
        self.model.load_state_dict(content["ema"].float().state_dict())
        self.trainer._load_checkpoint_state(content)

    def finish(self, file):
        packages.ultralytics().strip_optimizer(file)


class Yolov5:
    """A run of its script, whose one function trains and writes the file; that part is followed here."""

    system = "yolov5"

    def __init__(self, folder):
        package = packages.yolov5()
        layout = yaml.safe_load((package.folder / "models" / "yolov5n.yaml").read_text())
        torch.manual_seed(1)
        self.model = package.DetectionModel(narrow(layout))
        settings = (package.folder / "data" / "hyps" / "hyp.scratch-low.yaml").read_text()
        self.model.hyp = yaml.safe_load(settings)
        self.criterion = package.ComputeLoss(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        self.ema, self.file = package.ModelEMA(self.model, updates=BEFORE), folder / "last.pt"

    def loss(self, model, batch):
        targets = torch.cat([batch["batch_idx"][:, None], batch["cls"], batch["bboxes"]], 1)
        return self.criterion(model(batch["img"]), targets)[0].sum()

    def train(self, first, count):
        for batch in batches(first, count):
            self.loss(self.model, batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model)
            yield

    def save(self):
        half = {"model": copy.deepcopy(self.model).half(), "ema": copy.deepcopy(self.ema.ema).half()}
        counts = {"epoch": 0, "best_fitness": 0.5, "updates": self.ema.updates}
        torch.save({**half, **counts, "optimizer": self.optimizer.state_dict(), "opt": {}, "date": ""}, self.file)
        return self.file

    def resume(self, file):
        content = torch.load(file, weights_only=False)
        self.model.load_state_dict(content["model"].float().state_dict())
        packages.yolov5().smart_resume(content, self.optimizer, self.ema)

    def finish(self, file):
        with reading_code():
            packages.yolov5().strip_optimizer(file)


@contextlib.contextmanager
def reading_code():
    """yolov5 is older than the default of ``torch.load`` that refuses its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        yield


class Detector(LightningModule):
    """The same model in Lightning."""

    def __init__(self, run):
        super().__init__()
        self.run, self.detector = [run], copy.deepcopy(run.model)
        for parameter in self.detector.parameters():
            torch.nn.init.zeros_(parameter)

    def training_step(self, batch, batch_idx):
        return self.run[0].loss(self.detector, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


@pytest.fixture(scope="module", params=[Ultralytics, Yolov5])
def trained(request, tmp_path_factory):
    """A run after some steps, with the file that it wrote."""
    folder = tmp_path_factory.mktemp(request.param.system)
    run = request.param(folder)
    for _ in run.train(0, STEPS):
        pass
    return run, run.save(), clones(run.model.state_dict()), clones(run.ema.ema.state_dict())


def test_the_file_has_the_average_in_half_precision_and_the_count(trained):
    run, file, live, average = trained
    found = interop.read(file, allow_code=True)
    assert (found.system, found.steps) == ("yolo", BEFORE + STEPS)
    assert equal(found.weights, halves(average))
    assert not equal(found.weights, halves(live))
    assert equal(found.live, halves(live) if run.system == "yolov5" else {})


def test_the_file_is_refused_unless_code_is_allowed(trained, tmp_path, capsys):
    _, file, _, average = trained
    command = ["import", str(file), "--as", "weights", "--out", str(tmp_path / "average.pt")]
    assert main(command) == 1
    assert "cannot be read without running code that is in it" in capsys.readouterr().err
    assert main([*command, "--allow-code"]) == 0
    assert equal(torch.load(tmp_path / "average.pt", weights_only=True), halves(average))


def test_a_finished_run_has_the_average_under_model(trained, tmp_path):
    run, file, _, average = trained
    (tmp_path / "last.pt").write_bytes(file.read_bytes())
    run.finish(tmp_path / "last.pt")
    found = interop.read(tmp_path / "last.pt", allow_code=True)
    assert found.because.startswith("model, a module, and an empty ema")
    assert (found.steps, found.live) == (None, {})
    assert equal(found.weights, halves(average))


def test_a_trainer_goes_on_as_their_own_resumed_run_does(trained, tmp_path, capsys):
    """From the same file over the same batches: its own trainer with its ModelEMA, Lightning with the callback."""
    run, file, _, _ = trained
    resumed = type(run)(tmp_path)
    resumed.resume(file)
    module = Detector(resumed)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "model.ckpt")
    command = ["import", str(file), "--as", "lightning", "--allow-code", "--out", str(tmp_path / "resume.ckpt")]
    assert main([*command, "--like", str(tmp_path / "model.ckpt")]) == 0
    assert ("training goes on from the average" in capsys.readouterr().out) == (run.system == "ultralytics")

    for _ in resumed.train(STEPS, MORE):
        pass
    callback = ema(**recipes.ultralytics())
    this = trainer(callback, max_epochs=1, gradient_clip_val=10.0)
    data = DataLoader(list(batches(STEPS, MORE)), batch_size=None)
    this.fit(module, data, ckpt_path=tmp_path / "resume.ckpt")
    assert callback.average.num_steps == resumed.ema.updates == BEFORE + STEPS + MORE
    theirs = resumed.ema.ema.state_dict()
    for name, tensor in callback.average.named_tensors():
        torch.testing.assert_close(tensor, theirs[name.removeprefix("detector.")], atol=1e-5, rtol=1e-5, msg=name)
    live = dict(engine(callback.average).named_live())
    assert not torch.allclose(live["detector.model.0.conv.weight"], theirs["model.0.conv.weight"], atol=1e-4)


@pytest.mark.parametrize("make", [Ultralytics, Yolov5])
def test_thirty_steps_beside_each_other(make, tmp_path):
    run = make(tmp_path)
    average = WeightAverage(run.model, **recipes.ultralytics(updates=BEFORE))
    for _ in run.train(0, 30):
        average.step()
        theirs = run.ema.ema.state_dict()
        for name, tensor in average.named_tensors():
            torch.testing.assert_close(tensor, theirs[name], atol=5e-6, rtol=1e-5, msg=name)
    assert not torch.allclose(run.model.state_dict()["model.0.conv.weight"], theirs["model.0.conv.weight"], atol=1e-3)
