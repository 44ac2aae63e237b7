"""verify: what loaders let pass in silence fails here, and the scores are those of transformers itself."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import qexport
import qexport.errors
from qexport.calibrate.texts import read_documents
from qexport.errors import VerificationError
from qexport.specs import RtnSpec, VerifySpec, spec_of
from qexport.verification.perplexity import relative_difference, summarize
from tests.conftest import RunCli, shared
from tests.tiny import edit_json, edit_weights, in_transformers, tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("window", "stride"), [(128, 64), (32, 16), (32, 5), (32, 32), (32, 90)])
def test_perplexity_is_that_of_transformers(llama: Path, text: Path, window: int, stride: int) -> None:
    spec = VerifySpec(text=str(text), window=window, stride=stride, max_documents=12)
    found = qexport.evaluate(llama, spec).perplexity
    model = in_transformers(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    total, count = 0.0, 0
    for document in read_documents(text)[:12]:  # one token at a time over the same context rule, unbatched
        ids = tokenizer(document).input_ids[1:]
        done, room, step = 0, window - 1, min(stride, window - 1)
        while done < len(ids):
            end = min(room, len(ids)) if not done else min(done + step, len(ids))
            start = max(end - room, 0)
            row = torch.tensor([[0, *ids[start:end]]])
            with torch.no_grad():
                scores = model(row).logits[0].log_softmax(dim=-1)
            for place in range(done, end):
                total -= float(scores[place - start, ids[place]])
                count += 1
            done = end
    assert found.tokens == count
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """Against brute force: the spread of the estimate over many samples of units."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 60, (400, 200), generator=generator)
    noise = torch.randn(400, 200, generator=generator, dtype=torch.float64)
    sums = counts * (2 + 0.5 * noise)
    draws = [summarize(s.tolist(), c.tolist(), {}) for s, c in zip(sums, counts, strict=True)]
    spread = torch.tensor([draw.value for draw in draws]).std()
    claimed = torch.tensor([draw.standard_error for draw in draws]).mean()
    assert float(claimed / spread) == pytest.approx(1, abs=0.1)


def test_the_paired_difference() -> None:
    counts = [10, 20, 30]
    one = summarize([20.0, 44.0, 57.0], counts, {})
    other = summarize([20.0 + 1, 44.0 + 2, 57.0 + 3], counts, {})  # each token is worse by 0.1 nat
    difference = relative_difference(one, other)
    assert difference.loss == pytest.approx(math.exp(0.1) - 1)
    assert difference.standard_error == pytest.approx(0, abs=1e-12)  # paired: the texts' own spread is gone
    assert one.standard_error > 0.1
    with pytest.raises(ValueError, match="different text"):
        relative_difference(one, summarize([1.0], [1], {}))


def damaged(source: Path, out: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(source, out)
    edit_weights(out, **changes)
    return out


def test_tensors_that_are_not_as_they_should_be(llama: Path, text: Path, tmp_path: Path) -> None:
    weight = qexport.open_checkpoint(llama).read(f"{Q_PROJ}.weight")
    nan = weight.clone()
    nan[0, 0] = torch.nan
    cases: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
        "missing": ({"model.norm.weight": None}, r"1 tensors missing \(model.norm.weight\)"),
        "unexpected": ({"model.extra.weight": weight}, r"1 tensors unexpected \(model.extra.weight\)"),
        "shape": (
            {f"{Q_PROJ}.weight": weight[:64].clone()},
            r"wrong shape \(.* \[64, 128\], expected \[128, 128\]",
        ),
        "nan": ({f"{Q_PROJ}.weight": nan}, r"1 tensors not finite"),
    }
    for name, (changes, pattern) in cases.items():
        with pytest.raises(VerificationError, match=pattern):
            qexport.evaluate(damaged(llama, tmp_path / name, **changes), VerifySpec(text=str(text)))


def test_old_rotary_buffers_are_no_strangers(llama: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = damaged(llama, tmp_path / "old", **{name: torch.zeros(16)})
    qexport.evaluate(path, VerifySpec(text=str(text), max_documents=2))


def test_a_quantized_layer_that_lost_its_scales(llama: Path, text: Path, tmp_path: Path) -> None:
    parts = {"scales": RtnSpec(), "weight.absmax": spec_of("bnb"), "SCB": spec_of("bnb", bits=8)}
    for part, spec in parts.items():
        out = tmp_path / f"{spec.method}{spec.bits}"
        qexport.quantize(llama, out, spec)
        edit_weights(out, **{f"{Q_PROJ}.{part}": None})
        with pytest.raises((VerificationError, qexport.errors.CorruptFileError)):
            qexport.evaluate(out, VerifySpec(text=str(text)))


def test_the_gate_by_exit_code(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "two"
    qexport.quantize(llama, out, RtnSpec(bits=2))
    arguments = ("verify", out, "--reference", llama, "--text", text, "--window", "64")
    code, stdout, stderr = cli(*arguments, "--json")
    assert (code, stderr) == (0, "")
    loss = json.loads(stdout)["loss"]["loss"]
    assert loss > 0
    assert cli(*arguments, "--max-loss", f"{100 * loss + 1:.4f}%")[0] == 0
    code, _, stderr = cli(*arguments, "--max-loss", f"{100 * loss - 0.01:.4f}%")
    assert code == 1
    assert stderr.splitlines()[-1].startswith(f"error: {out} loses")
    code, stdout, _ = cli("verify", llama, "--reference", llama, "--text", text, "--max-loss", "0%")
    assert code == 0
    assert "loss\t+0.00% ±0.00" in stdout


def test_wrong_options(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    base = ("verify", llama, "--reference", llama)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", ')
    wrong = {
        ("--max-loss", "8"): "ambiguous; write a share with its sign",
        ("--max-loss", "lots"): "is not a share",
        ("--window", "1"): "--window 1: it should be greater than or equal to 2",
        ("--text", str(tmp_path / "none")): "does not exist",
        ("--text", str(text), "--pairs", str(broken)): "neither JSON nor JSON lines",
        ("--text", str(text), "--pairs", str(text)): "leave no room for an answer",
        ("--text", str(text), "--min-bleu", "20"): "--pairs FILE with a reference for each prompt",
        ("--max-kl", "-1"): "--max-kl -1.0: it should be greater than or equal to 0",
        ("--min-bleu", "101"): "--min-bleu 101.0: it should be less than or equal to 100",
    }
    for options, pattern in wrong.items():
        code, stdout, stderr = cli(*base, *options)
        assert (code, stdout) == (2, ""), options
        assert stderr.startswith("error: ")
        assert pattern in stderr
        assert stderr.count("\n") == 1


def test_bytes_that_qexport_did_not_write_are_noticed(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qexport.quantize(llama, out, RtnSpec())
    spec = VerifySpec(text=str(text), max_documents=2)
    assert qexport.evaluate(out, spec).tensors_checked == 20
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # still a whole file of finite numbers
    (out / "model.safetensors").write_bytes(weights)
    with pytest.raises(VerificationError, match=r"model.safetensors changed since qexport wrote it"):
        qexport.evaluate(out, spec)


def test_the_candidate_is_looked_at_before_the_reference_is_scored(llama: Path, text: Path) -> None:
    events: list[Any] = []
    with pytest.raises(qexport.errors.CheckpointNotFoundError):
        qexport.verify(llama, Path("nowhere"), VerifySpec(text=str(text)), on_event=events.append)
    assert events == []


def test_a_lost_output_head_is_no_tie(text: Path, tmp_path: Path) -> None:
    """transformers would load a random head: Llama's config class does not tie by itself."""
    path = tiny_model(tmp_path / "model", tied=False)
    edit_json(path / "config.json", tie_word_embeddings=None)
    qexport.evaluate(path, VerifySpec(text=str(text), max_documents=1))
    edit_weights(path, **{"lm_head.weight": None})
    with pytest.raises(VerificationError, match=r"1 tensors missing \(lm_head.weight\)"):
        qexport.evaluate(path, VerifySpec(text=str(text)))


def test_an_answer_ends_where_the_generation_config_says(llama: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a small model", "reference": "two\\nlines"}\n')
    spec = VerifySpec(text=str(pairs), pairs=str(pairs), max_new_tokens=12)
    (tmp_path / "text.txt").write_text("a small model")
    spec = spec.model_copy(update={"text": str(tmp_path / "text.txt")})
    long = qexport.evaluate(llama, spec).answers
    path = shutil.copytree(llama, tmp_path / "model")
    assert long is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a small model"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    generated = in_transformers(llama, dtype=torch.float32).generate(ids, do_sample=False, max_new_tokens=12)
    first = int(generated[0, ids.shape[1] + 2])  # the third token of the answer becomes an end
    edit_json(path / "generation_config.json", eos_token_id=[1, first])
    short = qexport.evaluate(path, spec).answers
    assert short is not None
    assert long.texts[0].startswith(short.texts[0])
    assert len(short.texts[0]) < len(long.texts[0])


def test_one_document_has_no_standard_error_and_the_json_is_json(
    llama: Path, tmp_path: Path, cli: RunCli
) -> None:
    (tmp_path / "text.txt").write_text("a small model")
    code, out, _ = cli("verify", llama, "--reference", llama, "--text", tmp_path / "text.txt", "--json")
    assert code == 0
    result = json.loads(out, parse_constant=pytest.fail)
    assert result["loss"] == {"loss": 0.0, "standard_error": None}
    assert result["candidate"]["tensors_checked"] == 20
    code, out, _ = cli("verify", llama, "--reference", llama, "--text", tmp_path / "text.txt")
    assert "nan" not in out


@pytest.mark.slow
def test_perplexity_of_a_real_model_is_the_published_one() -> None:
    """11.2 on these lines, as the model's own notes say."""
    spec = VerifySpec(text=str(shared("text", "multi30k-val.jsonl")), max_documents=150)
    found = qexport.evaluate(shared("models", "captions22m"), spec).perplexity
    assert found.value == pytest.approx(11.2, abs=0.1)
