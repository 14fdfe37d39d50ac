"""SAM in Lightning and in Hugging Face's Trainer, by the recipes, where these packages are."""

import importlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowland

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"
PARTS, EPOCHS = 2, 2

pytestmark = [
    pytest.mark.slow,  # to load the packages takes its time
    pytest.mark.filterwarnings("ignore"),  # the packages' own
]


def recipe(*classes, **names):
    """The last of some classes that the recipes define, with what these take for granted."""
    text = RECIPES.read_text()
    for name in classes:
        block = re.search(rf"^```py\n(class {name}\(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        exec(block[1], names)  # noqa: S102
    return names[classes[-1]]


def by_hand(model, parts, loss_of, *, base, accumulate, clip=None, **settings):
    """The same training by one call a step."""
    sam = lowland.SAM(model.parameters(), base, **settings)

    def clipped(*_):
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    if clip is not None:
        sam.base_optimizer.register_step_pre_hook(clipped)

    def closure(part):
        loss = loss_of(model, part)
        loss.backward()
        return loss

    for _ in range(EPOCHS):
        for start in range(0, len(parts), accumulate):
            sam.step(closure, micro_batches=parts[start : start + accumulate], model=model)
    return model.state_dict()


# Lightning


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def samples():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))


def fit(module, *, sixteen=False, **settings):
    lightning = importlib.import_module("lightning")
    if sixteen:  # without the accelerator that its own choice asks for
        plugins = importlib.import_module("lightning.pytorch.plugins")
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        settings["plugins"] = [plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(samples(), batch_size=6))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    ("settings", "half"),
    [({}, None), ({"precision": "bf16-mixed"}, torch.bfloat16), ({"sixteen": True}, torch.float16)],
    ids=["single", "bf16-mixed", "16-mixed"],
)
@pytest.mark.parametrize("accumulate", [1, PARTS])
def test_lightning_drives_it(accumulate, settings, half, clip):
    lightning = pytest.importorskip("lightning")
    if clip is not None and accumulate > 1:
        pytest.skip("in manual optimization Lightning does not clip")
    criterion = nn.CrossEntropyLoss()
    names = {"lightning": lightning, "torch": torch, "criterion": criterion, "SAM": lowland.SAM}
    classes = ["Module"] if accumulate == 1 else ["Module", "Accumulating"]
    module = recipe(*classes, **names)(network())
    fit(module, gradient_clip_val=clip, **settings)

    def loss_of(model, part):
        with torch.autocast("cpu", half, enabled=half is not None):
            return criterion(model(part[0]), part[1])

    expected = by_hand(
        network(),
        list(DataLoader(samples(), batch_size=6)),
        loss_of,
        base=torch.optim.SGD,
        accumulate=accumulate,
        clip=clip,
        rho=0.05,
        lr=0.1,
    )
    torch.testing.assert_close(module.model.state_dict(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sixteen", [False, True])
def test_what_lightning_accumulates_without_it_is_refused(sixteen):
    lightning = pytest.importorskip("lightning")
    names = {"torch": torch, "criterion": nn.CrossEntropyLoss(), "SAM": lowland.SAM}
    module = recipe("Module", lightning=lightning, **names)(network())
    with pytest.raises(RuntimeError, match=r"accumulate\(closure\) for every one"):
        fit(module, accumulate_grad_batches=2, sixteen=sixteen)


# Hugging Face


def language_model():
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def texts():
    torch.manual_seed(1)
    return torch.randint(0, 50, (24, 8))


def hugging_face(folder, *, accumulate, scaled=False, resume=None, epochs=EPOCHS, **settings):
    transformers = importlib.import_module("transformers")
    trainer = recipe("SAMTrainer", transformers=transformers, torch=torch, SAM=lowland.SAM)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no"} | settings,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in texts()]
    trainer = trainer(model=language_model(), args=arguments, train_dataset=data)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    if scaled:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.parametrize("accumulate", [1, PARTS])
@pytest.mark.parametrize("way", ["single", "bf16", "scaled"])
def test_hugging_face_drives_it(way, accumulate, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # Without mixed precision it would not unscale for clipping.
    settings = {"bf16": way == "bf16", "max_grad_norm": 0.0 if way == "scaled" else 1.0}
    found = hugging_face(tmp_path, accumulate=accumulate, scaled=way == "scaled", **settings)

    def loss_of(model, ids):
        count = torch.tensor(float(accumulate * ids.numel()))  # as it weighs micro-batches
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            return accumulate * model(input_ids=ids, labels=ids, num_items_in_batch=count).loss

    expected = by_hand(
        language_model().train(),
        list(texts().split(4)),
        loss_of,
        base=torch.optim.AdamW,
        accumulate=accumulate,
        clip=settings["max_grad_norm"] or None,
        lr=0.01,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hugging_face_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run = partial(hugging_face, tmp_path, accumulate=1, save_strategy="epoch")
    whole = run()
    resumed = run(resume=str(tmp_path / "checkpoint-6"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
