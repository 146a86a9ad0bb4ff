"""The exact words on stderr after a mistake, made in one fresh process so that no other test's classes are known."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, tempfile
import torch, lightning.pytorch
import my_package
from lightning_plugins.cli import main

torch.set_num_threads(1)
told = []
for words in json.load(sys.stdin):
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            main(words)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
        file.seek(0)
        told.append([status, file.read().decode()])
json.dump(told, sys.stdout)
"""

FILES = {
    "key.yaml": "model: {class_path: CapsNet, init_args: {iteratons: 3}}\ndata: Digits\n",
    "root.yaml": "modl: {class_path: CapsNet}\ndata: Digits\n",
    "trainer.yaml": "model: CapsNet\ndata: Digits\ntrainer: {max_epoch: 3}\n",
    "forgot.yaml": "model: {class_path: CapsNet, iterations: 3}\n",
    "broken.yaml": "model: CapsNet\n  data: [1,\n",
    "number.yaml": "model: CapsNet\ndata: Digits\ntrainer: 3\n",
    "nothing.yaml": "model: CapsNet\ndata: Digits\ntrainer:\n",
    "list.yaml": "- model\n- data\n",
    "hollow_trainer.yaml": "model: CapsNet\ndata: Digits\ntrainer: {typo_key: {}}\n",
    "hollow_root.yaml": "model: CapsNet\ndata: Digits\nmodle: {deep: {}}\n",
    "hollow_key.yaml": "model: {class_path: CapsNet, init_args: {iteratons: {}}}\ndata: Digits\n",
    "hollow_data.yaml": "model: CapsNet\ndata: {typo: {}}\n",
    "hollow_callback.yaml": "trainer: {callbacks: [{class_path: Flooding, init_args: {level: 0.1, levl: {}}}]}\n",
    "empty.ckpt": "",
    "text.ckpt": "not a checkpoint",
}

FIT = "fit --model CapsNet --data Digits "
TOY = "fit --model my_package.ToyNet --data my_package.ToyData "

MISTAKES = {
    "ft": """\
error: a command comes first, not 'ft'.
Did you mean fit?
Commands: fit, validate, test, predict, generate, sample, export, consolidate, list, copy, new, plot
""",
    "--config capsnet/digits fit": """\
error: a command comes first, not '--config'.
Commands: fit, validate, test, predict, generate, sample, export, consolidate, list, copy, new, plot
""",
    "fit --config capsnet/digts": """\
error: no file and no shipped config is called 'capsnet/digts'.
Did you mean capsnet/digits?
All configs: lightning-plugins list
""",
    "fit --config nowhere/mine.yaml": """\
error: no file and no shipped config is called 'nowhere/mine.yaml'.
All configs: lightning-plugins list
""",
    FIT + "--model.iteratons 3": """\
error: CapsNet has no argument 'iteratons' (model.iteratons).
Did you mean iterations?
All of them: --model.help CapsNet
""",
    "fit --config key.yaml": """\
error: key.yaml: CapsNet has no argument 'iteratons' (model.iteratons).
Did you mean iterations?
All of them: --model.help CapsNet
""",
    "fit --config root.yaml": """\
error: fit has no option 'modl'.
Did you mean --model?
All options: lightning-plugins fit --help
""",
    "fit --config trainer.yaml": """\
error: fit has no option 'trainer.max_epoch'.
Did you mean --trainer.max_epochs?
All options: lightning-plugins fit --trainer.help
""",
    "fit --config hollow_trainer.yaml": """\
error: hollow_trainer.yaml: fit has no option 'trainer.typo_key'.
All options: lightning-plugins fit --trainer.help
""",
    "fit --config hollow_root.yaml": """\
error: hollow_root.yaml: fit has no option 'modle'.
Did you mean --model?
All options: lightning-plugins fit --help
""",
    "fit --config hollow_key.yaml": """\
error: hollow_key.yaml: CapsNet has no argument 'iteratons' (model.iteratons).
Did you mean iterations?
All of them: --model.help CapsNet
""",
    "fit --config hollow_data.yaml": """\
error: hollow_data.yaml: fit has no option 'data.typo'.
Did you mean --data.pad?
All options: lightning-plugins fit --help
""",
    "fit --config hollow_callback.yaml": """\
error: hollow_callback.yaml: Flooding has no argument 'levl' (trainer.callbacks.levl).
Did you mean level?
All of them: level, scope, level_schedule, start
""",
    FIT + "--seed_everything -1": """\
error: seed_everything takes a whole number from 0 to 4294967295, or true/false, not -1.
""",
    FIT + "--seed_everything 4294967296": """\
error: seed_everything takes a whole number from 0 to 4294967295, or true/false, not 4294967296.
""",
    "fit --model EAE --data Digits --model.lr null": """\
error: model.lr takes float, not null.
Leave it out for its default, 0.0005.
""",
    TOY + "--model.lr null": """\
error: model.lr takes float, not null.
Leave it out for its default, 0.1.
""",
    "fit --model CapsNet --data Digits --data.batch_size null": """\
error: data.batch_size takes int, not null.
Leave it out for its default, 128.
""",
    "fit --config forgot.yaml": """\
error: forgot.yaml: model has class_path and init_args, not 'iterations'.
Arguments such as 'iterations' stand under init_args.
""",
    "fit --config broken.yaml": """\
error: broken.yaml: not valid YAML: mapping values are not allowed in this context in "<unicode string>", line 2, \
column 7.
""",
    "fit --config list.yaml": """\
error: list.yaml: a config holds keys and values, such as `model: CapsNet`; this one is empty or a list.
""",
    "fit --config number.yaml": """\
error: trainer: has its settings below it, such as max_epochs: 3, not 3.
""",
    "fit --config nothing.yaml": """\
error: trainer: has its settings below it, such as max_epochs: 3, not nothing.
""",
    "fit --model CapsNet --data IdxImages": """\
error: data: the following arguments are required: folder
""",
    "fit --model CapsNet --data IdxImages --data.folder /nowhere": """\
Seed set to 0
error: IdxImages: folder='/nowhere' is not a folder.
""",
    "fit --model CapsNt": """\
error: no LightningModule is called 'CapsNt' (model).
Did you mean CapsNet?
Known: CapsNet, DiffusionTeacher, EAE, Independent, SiD, ToyNet, UniLMSeq2Seq
A class of your own is given by its path: package.module.Class
""",
    "fit --model my_package.ToyNt": """\
error: model: cannot import 'my_package.ToyNt' (module 'my_package' has no attribute 'ToyNt').
Did you mean ToyNet?
Looked in the current folder and in the installed packages.
""",
    "fit --model nobody.Net": """\
error: model: cannot import 'nobody.Net' (No module named 'nobody').
Looked in the current folder and in the installed packages.
""",
    "fit --model torch.nn.Linear": """\
error: model takes a LightningModule, and 'torch.nn.Linear' is not one.
""",
    "fit --trainer.callbacks+=EarlyStoping": """\
error: no Callback is called 'EarlyStoping' (trainer.callbacks).
Did you mean EarlyStopping?
A class of your own is given by its path: package.module.Class
""",
    "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x": """\
error: EarlyStopping has no argument 'monitr' (trainer.callbacks.monitr).
Did you mean monitor?
All of them: --trainer.callbacks.help EarlyStopping
""",
    FIT + "--model.optimizer Adm": """\
error: no Optimizer is called 'Adm' (model.optimizer).
Did you mean Adam?
A class of your own is given by its path: package.module.Class
""",
    FIT + "--model.optimizer SGD --model.optimizer.momntum 0.9": """\
error: SGD has no argument 'momntum' (model.optimizer.momntum).
Did you mean momentum?
All of them: --model.optimizer.help SGD
""",
    FIT + "--model.iterations three": """\
error: model.iterations takes int or null, not 'three'.
""",
    FIT + "--trainer.max_epochs some": """\
error: trainer.max_epochs takes int or null, not 'some'.
""",
    FIT + "--model.image_shape [28,28]": """\
error: model.image_shape takes tuple with 3 elements, not '[28, 28]'.
""",
    FIT + "--model.gradient lst": """\
error: model.gradient has no choice 'lst'.
Did you mean last?
Choices: full, last
""",
    FIT + "--model.routing kmean": """\
error: model.routing has no choice 'kmean'.
Did you mean kmeans?
Choices: dynamic, kmeans, kmeans_squash, uniform, self_attention
""",
    FIT + "--trainer.max_epoch 3": """\
error: fit has no option '--trainer.max_epoch'.
Did you mean --trainer.max_epochs?
All options: lightning-plugins fit --trainer.help
""",
    FIT + "--batch_size 3": """\
error: fit has no option '--batch_size'.
Did you mean --data.batch_size?
All options: lightning-plugins fit --help
""",
    FIT + "stray": """\
error: fit takes options only, not 'stray'.
""",
    "fit --model": """\
error: --model needs a value.
""",
    "fit --model.lr 0.1 --model CapsNet": """\
error: --model.lr comes before the class is known: give --model or --config first.
""",
    "fit --data Digits": """\
error: fit needs a model: --config NAME, --model CLASS.
Names: lightning-plugins list
""",
    "test --data Digits": """\
error: test needs a model: --config NAME, --model CLASS or --ckpt_path FILE.
Names: lightning-plugins list
""",
    "fit --model CapsNet": """\
error: fit needs data: --data CLASS (CapsNet has no train_dataloader of its own).
Names: lightning-plugins list
""",
    FIT + "--model.num_classes 7": """\
Seed set to 0
error: model.num_classes 7 was given, but Digits's is 10.
Leave it out: the data decides.
""",
    TOY + "--model.image_shape [1,28,28]": """\
Seed set to 0
error: model.image_shape (1, 28, 28) was given, but ToyData's is (1, 8, 8).
Leave it out: the data decides.
""",
    TOY + "--model.lr -1": """\
Seed set to 0
error: lr must be positive, got -1.0.
Raised in my_package/__init__.py, line 16
""",
    "test --data Digits --ckpt_path nowhere.ckpt": """\
error: checkpoint 'nowhere.ckpt' does not exist.
""",
    "test --data Digits --ckpt_path emty.ckpt": """\
error: checkpoint 'emty.ckpt' does not exist.
Did you mean empty.ckpt?
""",
    "test --data Digits --ckpt_path empty.ckpt": """\
error: checkpoint 'empty.ckpt' is empty: the run that wrote it was cut off. Use an earlier one.
""",
    "test --data Digits --ckpt_path text.ckpt": """\
error: 'text.ckpt' is not a Lightning checkpoint, or is damaged.
""",
    "test --data Digits --ckpt_path last --trainer.default_root_dir /nowhere": """\
error: --ckpt_path last: no run in '/nowhere' has a checkpoint.
Give its file, or the folder above lightning_logs: --trainer.default_root_dir FOLDER
""",
    "fit --config sid/digits": """\
error: the teacher 'digits_teacher' is no folder in 'FOLDER'. This command makes it:
lightning-plugins fit --config sid/digits_teacher
""",
    "fit --config sid/mnist": """\
error: the teacher 'mnist_teacher' is no folder in 'FOLDER'. This command makes it:
lightning-plugins fit --config sid/digits_teacher --data HFImages --data.path ylecun/mnist --data.image_size 32 \
--data.val_size 5000 --data.batch_size 128 --model.block_out_channels "[64, 128, 128]" --model.lr 5e-4 \
--model.export_to mnist_teacher --trainer.accelerator gpu --trainer.max_epochs 50 --trainer.check_val_every_n_epoch 5
""",
    "copy capsnet/digts .": """\
error: no shipped config or recipe is called 'capsnet/digts'.
Did you mean capsnet/digits?
All names: lightning-plugins list
""",
    "copy capsnet/digits": """\
error: the following arguments are required: dest.
All options: lightning-plugins copy --help
""",
    "copy capsnet/digits key.yaml": """\
error: 'key.yaml' exists and is not overwritten; choose another name.
""",
    "--print_completion fish": """\
error: --print_completion needs a shell: bash, zsh or tcsh.
""",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory, write_project):
    folder = write_project(tmp_path_factory.mktemp("mistakes"))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    words = json.dumps([line.split() for line in MISTAKES])
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, input=words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    left = {path.name for path in folder.iterdir()} - {"my_package", *FILES}
    assert not left  # a mistake leaves nothing behind
    told = json.loads(run.stdout.replace(str(folder), "FOLDER"))
    return dict(zip(MISTAKES, told, strict=True))


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake(words, told):
    status, text = told[words]
    assert text == MISTAKES[words]
    assert status == 2
    assert len(text.splitlines()) <= 5


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        (["--config=eae/digits"], ["--data=PythonDocstrings"], "EAE takes batches {"),
        (["--config=capsnet/digits"], ["--data=PythonDocstrings"], "CapsNet takes batches {"),
        (["--model=DiffusionTeacher"], ["--data=PythonDocstrings"], "DiffusionTeacher takes batches {"),
        (["--config=unilm/docstrings_minilm"], ["--data=Digits"], "UniLMSeq2Seq takes batches {"),
    ],
)
def test_data_of_another_kind_is_a_line(mistake, model, data, told):
    text = mistake("fit", *model, *data, "--data.batch_size=8")
    assert text.startswith(f"error: {told}") and len(text.splitlines()) == 1
