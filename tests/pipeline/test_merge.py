"""The merged model is base plus adapter: in numbers, in answers, and as files that a server reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.stages import Finished, Workspace
from tuneserve_pipeline import merge as stage
from tuneserve_pipeline.contract import MergeSpec, StageInput, TrainSpec, output_digest
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.fidelity import Fidelity, answer_logits, compare
from tuneserve_pipeline.output import digest_files
from tuneserve_pipeline.rows import IGNORED, Row
from tuneserve_pipeline.tokenization import Base, read_base

SPEC = TrainSpec(max_steps=8, learning_rate=5e-3, global_batch_size=8, max_sequence_length=256)
ANSWER = [40, 41, 2]
PROMPTS = [
    Row(input_ids=[*prompt, *ANSWER], labels=[IGNORED] * len(prompt) + ANSWER)
    for prompt in (range(at, at + 9 + at % 20) for at in range(5, 300, 13))
]


@pytest.fixture(scope="module")
def trained(
    prepared: tuple[Workspace, Finished], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Finished]:
    workspace = Workspace(root=tmp_path_factory.mktemp("to-merge"), base_model=prepared[0].base_model)
    finished = workspace.run(workspace.config(SPEC, parents={"prepare": prepared[1]}))
    assert finished.code == 0, finished.log
    return workspace, finished


@pytest.fixture(scope="module")
def merged(prepared: tuple[Workspace, Finished], trained: tuple[Workspace, Finished]) -> Finished:
    workspace, adapter = trained
    finished = workspace.run(workspace.config(MergeSpec(), parents={"prepare": prepared[1], "train": adapter}))
    assert finished.code == 0, finished.log
    return finished


@pytest.fixture
def base(prepared: tuple[Workspace, Finished]) -> Base:
    return read_base(prepared[1].directory)


def adapted(base: Base, *, dtype: torch.dtype, size: float = 0.05) -> PeftModel:
    """The tiny model with an adapter that changes its answers."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return wrapped


def test_in_fp32_merged_equals_unmerged(base: Base) -> None:
    model = adapted(base, dtype=torch.float32)
    with model.disable_adapter():
        plain = answer_logits(model, PROMPTS)
    reference = answer_logits(model, PROMPTS)
    assert compare(plain, reference).max_logit_difference > 1e-2  # the adapter does something
    figures = compare(reference, answer_logits(stage.merge(model), PROMPTS))
    assert figures.max_logit_difference < 1e-4
    assert figures.top1_agreement == 1.0
    assert figures.positions == 3 * len(PROMPTS)


def test_in_bf16_each_sum_is_rounded_once(base: Base) -> None:
    model = adapted(base, dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    weight = layer.get_base_layer().weight.detach().clone()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = weight.double() + layer.scaling["default"] * (b.double() @ a.double())
    reference = answer_logits(model, PROMPTS)
    merged = stage.merge(model)
    found = merged.model.layers[1].mlp.down_proj.weight.detach()
    assert found.dtype is torch.bfloat16
    # Half a unit in the last place, and the noise of fp32: two roundings would reach a whole one.
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * (0.5 + 1e-3) * 2 + 1e-8).all()
    assert (found == exact.to(torch.bfloat16)).float().mean() > 0.999
    figures = compare(reference, answer_logits(merged, PROMPTS))
    assert figures.max_logit_difference < 0.1
    assert figures.top1_agreement >= 0.95


def test_comparison_is_in_fp32_and_leaves_the_weights_alone(base: Base) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = answer_logits(model, PROMPTS)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    wide = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16).float()
    rows = [torch.tensor([row.input_ids]) for row in PROMPTS]
    with torch.inference_mode():
        # One row at a time, no padding: the last three positions but one choose the answer.
        expected = torch.cat([wide(input_ids=row).logits[0, -4:-1] for row in rows])
    assert torch.allclose(found, expected, atol=1e-4)


def test_adapter_that_is_not_finite_is_refused(base: Base) -> None:
    model = adapted(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(InvalidConfig, match=r"layers\.0\.self_attn\.q_proj .*lower spec\.training\.learningRate"):
        stage.merge(model)


def test_too_little_agreement_is_refused() -> None:
    stage.check(Fidelity(top1_agreement=0.95, max_logit_difference=1.0, positions=100))
    with pytest.raises(InvalidConfig, match=r"at 6\.0% of 100 positions \(at most 5% may differ\)"):
        stage.check(Fidelity(top1_agreement=0.94, max_logit_difference=1.0, positions=100))


def test_logits_that_are_not_finite_are_no_result() -> None:
    good = torch.zeros(2, 4)
    assert compare(good, good).top1_agreement == 1.0
    with pytest.raises(ValueError, match="not finite"):
        compare(good, torch.full((2, 4), float("nan")))


def test_stage_measures_the_merge(merged: Finished) -> None:
    metrics = merged.outcome.metrics
    assert metrics["mergeTop1Agreement"] >= 0.95
    assert 0 < metrics["mergeMaxLogitDifference"] < 0.1
    assert merged.outcome.facts["dtype"] == "bfloat16"


def test_model_has_the_adapter_in_it(merged: Finished, trained: tuple[Workspace, Finished], base: Base) -> None:
    weights = load_file(merged.directory / "model/model.safetensors")
    before = load_file(base.path / "model.safetensors")
    adapter = load_file(trained[1].directory / "adapter/adapter_model.safetensors")
    assert weights.keys() == before.keys()
    for name, value in before.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in adapter:
            assert torch.equal(weights[name], value), name
            continue
        delta = adapter[f"{prefix}.lora_B.weight"].float() @ adapter[f"{prefix}.lora_A.weight"].float()
        assert torch.equal(weights[name], (value.float() + 2.0 * delta).to(torch.bfloat16)), name
        assert not torch.equal(weights[name], value), name


def test_model_is_ready_to_serve(merged: Finished, prepared: tuple[Workspace, Finished]) -> None:
    directory = merged.directory / "model"
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert merged.json("model/generation_config.json")["eos_token_id"] == 2
    assert (directory / "chat_template.jinja").read_text() == (
        prepared[1].directory / "chat_template.jinja"
    ).read_text()
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in directory.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The phone was great."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_generation_config_that_the_library_would_refuse_is_kept(base: Base, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(base.path, source)
    told = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": None}
    (source / "generation_config.json").write_text(json.dumps(told))
    tokenizer = replace(base.tokenizer, end_ids=frozenset({2, 0}))
    strange = replace(base, path=source, tokenizer=tokenizer)
    stage.write_model(stage.load_model(source), base=strange, target=tmp_path / "model")
    assert json.loads((tmp_path / "model/generation_config.json").read_text()) == told | {"eos_token_id": [0, 2]}


def test_adapter_with_no_numbers_fails_and_leaves_nothing(
    prepared: tuple[Workspace, Finished], trained: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    workspace, adapter = trained
    directory = tmp_path / "train"
    shutil.copytree(adapter.directory, directory)
    path = directory / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_A" in name)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    files = digest_files(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["outcome"]["digest"] = output_digest(files)
    manifest["files"] = [file.model_dump() for file in files]
    (directory / "manifest.json").write_text(json.dumps(manifest))

    mine = Workspace(root=tmp_path, base_model=workspace.base_model)
    config = mine.config(MergeSpec(), parents={"prepare": prepared[1]})
    told = StageInput(path=str(directory), digest=output_digest(files))
    failed = mine.run(config.model_copy(update={"inputs": {**config.inputs, "train": told}}))
    assert (failed.code, failed.reason) == (64, "MergeNotFinite"), failed.log
    assert not failed.directory.exists()
    assert not Path(config.output + ".partial").exists()


def test_missing_adapter_says_what_to_rebuild(
    prepared: tuple[Workspace, Finished], trained: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    workspace, adapter = trained
    mine = Workspace(root=tmp_path, base_model=workspace.base_model)
    gone = replace(adapter, directory=tmp_path / "gone")
    failed = mine.run(mine.config(MergeSpec(), parents={"prepare": prepared[1], "train": gone}))
    assert (failed.code, failed.reason) == (64, "InputMissing"), failed.log
    assert "tuneserve.dev/rebuild: train" in failed.message
