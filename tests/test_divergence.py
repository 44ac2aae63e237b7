"""KL divergence and the same most likely token: against transformers' own logits, kept whole or in part."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import qexport
from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import ScoredWindow
from qexport.errors import CalibrationError, StorageError
from qexport.results import Divergence, Evaluation
from qexport.specs import RtnSpec, VerifySpec
from qexport.verification.divergence import divergence_difference, token_divergence
from qexport.verification.evaluate import Reference
from qexport.verification.kept_logits import (
    KeptLogitsWriter,
    Layout,
    hash_of_tokens,
    open_logits,
    plan_logits,
)
from qexport.verification.units import Units, standard_error
from tests.tiny import edit_json, edit_weights, in_transformers, tiny_model


@pytest.fixture(scope="module")
def two_bits(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "model"
    qexport.quantize(llama, out, RtnSpec(bits=2))
    return out


def test_it_is_that_of_transformers(llama: Path, two_bits: Path, text: Path, tmp_path: Path) -> None:
    spec = VerifySpec(text=str(text), window=128, stride=64)
    full = qexport.evaluate(llama, spec, keep_logits=tmp_path / "logits")
    assert full.divergence is None
    found = qexport.evaluate(two_bits, spec, reference=Reference(full, tmp_path / "logits", llama)).divergence
    assert found is not None

    decoded = tmp_path / "decoded"
    qexport.convert(two_bits, decoded)
    models = [in_transformers(path, dtype=torch.float32) for path in (llama, decoded)]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    values: list[float] = []
    same = 0
    for document in read_documents(text):
        ids = torch.tensor([tokenizer(document).input_ids])
        with torch.no_grad():
            theirs, ours = (model(ids).logits[0, :-1].double().log_softmax(dim=-1) for model in models)
        values += (theirs.exp() * (theirs - ours)).sum(dim=-1).tolist()
        same += int((theirs.argmax(dim=-1) == ours.argmax(dim=-1)).sum())
    assert found.tokens == len(values)
    assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert found.percentile_99 == pytest.approx(float(torch.tensor(values).quantile(0.99)), rel=1e-3)
    assert found.same_top == same / len(values)
    assert found.standard_error > 0
    assert found.recipe["kept_logits"] == found.recipe["vocabulary"]


def test_a_model_is_not_far_from_itself(llama: Path, text: Path, tmp_path: Path) -> None:
    spec = VerifySpec(text=str(text), window=64, max_documents=12)
    full = qexport.evaluate(llama, spec, keep_logits=tmp_path / "logits")
    found = qexport.evaluate(llama, spec, reference=Reference(full, tmp_path / "logits", llama)).divergence
    assert found is not None
    assert abs(found.mean) < 1e-7  # what 16 bits cost
    assert found.same_top == 1


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_what_is_kept_of_the_likeliest_is_a_lower_bound(tmp_path: Path, share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    windows = [ScoredWindow([1, 2, 3, 4, 5], 1, 0), ScoredWindow([3, 1, 2], 2, 1)]
    vocabulary = 3000
    logits = [6 * torch.randn(w.scored, vocabulary, generator=generator) for w in windows]
    other = [x + 0.5 * torch.randn(x.shape, generator=generator) for x in logits]
    layout = plan_logits("key", windows, vocabulary, int(share * 5 * (12 + 2 * vocabulary)))
    assert (layout.kept == vocabulary) == (share == 1)
    with KeptLogitsWriter(tmp_path / "logits", layout) as writer:
        for n in (1, 0):  # in any order
            writer.add(n, logits[n])
    kept = open_logits(tmp_path / "logits", "key")
    assert kept is not None
    assert (tmp_path / "logits").stat().st_size < 1.1 * share * 5 * (12 + 2 * vocabulary) + 300
    for n in (0, 1):
        p, q = logits[n].double().log_softmax(dim=-1), other[n].double().log_softmax(dim=-1)
        exact = (p.exp() * (p - q)).sum(dim=-1)
        found, same = kept.divergence(n, other[n])
        assert torch.equal(same, logits[n].argmax(dim=-1) == other[n].argmax(dim=-1))
        if share == 1:
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-7)
        else:
            assert bool((found <= exact + 1e-6).all())
            torch.testing.assert_close(found, exact, rtol=0.02, atol=1e-5)


def test_tokens_that_a_model_never_says(tmp_path: Path) -> None:
    """Logits of -inf, as masked vocabularies have them."""
    windows = [ScoredWindow([1, 2, 3], 1, 0)]
    logits = torch.randn(2, 50)
    logits[:, 7] = -math.inf
    layout = plan_logits("key", windows, 50, 10**6)
    with KeptLogitsWriter(tmp_path / "logits", layout) as writer:
        writer.add(0, logits)
    kept = open_logits(tmp_path / "logits", "key")
    assert kept is not None
    found, _ = kept.divergence(0, logits)
    assert float(found.abs().max()) < 1e-6


def test_what_is_not_kept_does_not_count() -> None:
    p = torch.tensor([[0.5, 0.25]]).log()
    q = torch.tensor([[0.25, 0.25]]).log()
    exact = 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5)
    assert float(token_divergence(p, q)) == pytest.approx(exact, rel=1e-6)


def test_a_file_that_is_none_or_anothers(tmp_path: Path) -> None:
    windows = [ScoredWindow([1, 2, 3], 1, 0)]
    path = tmp_path / "logits"
    assert open_logits(path, "key") is None
    with KeptLogitsWriter(path, plan_logits("key", windows, 50, 10**6)) as writer:
        writer.add(0, torch.zeros(2, 50))
    assert open_logits(path, "another") is None
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"x" + whole, whole[:30], whole.replace(b'"kept": 50', b'"kept": -5')):
        path.write_bytes(damaged)
        assert open_logits(path, "key") is None
    with pytest.raises(StorageError):
        KeptLogitsWriter(path, Layout("key", "", 10**6, 10**6, (10**12,)))
    with (
        pytest.raises(RuntimeError),
        KeptLogitsWriter(tmp_path / "half", plan_logits("k", windows, 50, 10**6)),
    ):
        raise RuntimeError
    assert not (tmp_path / "half").exists()


def test_logits_that_are_gone_are_made_anew(llama: Path, two_bits: Path, text: Path, tmp_path: Path) -> None:
    spec = VerifySpec(text=str(text), window=64, max_documents=3)
    kept = tmp_path / "logits"
    full = qexport.evaluate(llama, spec, keep_logits=kept)
    first = qexport.evaluate(two_bits, spec, reference=Reference(full, kept, llama)).divergence
    before = kept.read_bytes()
    kept.unlink()
    assert qexport.evaluate(two_bits, spec, reference=Reference(full, kept, llama)).divergence == first
    assert kept.read_bytes() == before


def test_another_tokenizer_is_told_by_its_first_difference(llama: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    spec = VerifySpec(text=str(text), window=64, max_documents=3)
    with pytest.raises(
        CalibrationError, match=r"cut the text into different tokens: after \d+ tokens \d+ \('.*'\), there"
    ):
        qexport.verify(llama, other, spec)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    windows = [ScoredWindow([1, 2, 3], 1, 0)]
    with KeptLogitsWriter(tmp_path / "logits", plan_logits("key", windows, 50, 10**6)) as writer:
        writer.add(0, torch.zeros(2, 50))
    kept = open_logits(tmp_path / "logits", "key")
    assert kept is not None
    with pytest.raises(CalibrationError, match="foretells 51 tokens, its reference 50"):
        kept.divergence(0, torch.zeros(2, 51))


def test_where_not_a_number_begins_is_told(llama: Path, text: Path, tmp_path: Path) -> None:
    """Finite weights whose products are none: the first such block has its name in the error."""
    huge = tiny_model(tmp_path / "huge")
    edit_json(huge / "config.json", dtype="float32")
    weight = qexport.open_checkpoint(llama).read("model.layers.1.mlp.down_proj.weight")
    gate = qexport.open_checkpoint(llama).read("model.layers.1.mlp.gate_proj.weight")
    edit_weights(
        huge,
        **{
            "model.layers.1.mlp.down_proj.weight": torch.full_like(weight, 3e38, dtype=torch.float32),
            "model.layers.1.mlp.gate_proj.weight": torch.full_like(gate, 1e30, dtype=torch.float32),
        },
    )
    with pytest.raises(qexport.errors.NonFiniteError, match=r"model\.layers\.1 gives NaN or infinity"):
        qexport.evaluate(huge, VerifySpec(text=str(text), window=64, max_documents=2))


def test_units_and_their_standard_error() -> None:
    windows = [ScoredWindow([0] * (3 + n % 2), 1, n // 2) for n in range(40)]
    units = Units(windows)  # twenty documents of two windows
    assert units.tokens == (5,) * 20
    assert units.sums(list(range(40)))[:2] == (1, 5)
    few = Units(windows[:8])  # four documents are too few: windows
    assert few.tokens == (2, 3) * 4
    values = [float(value % 7) for value in range(30)]
    plain = torch.tensor(values).std() / math.sqrt(30)
    assert standard_error(values, [1] * 30) == pytest.approx(float(plain), rel=1e-6)


def test_differences_are_paired() -> None:
    def made(sums: tuple[float, ...]) -> Divergence:
        return Divergence(0, 0, 0, 1, 0, 40, sums, (10, 10, 20), {})

    found = divergence_difference(made((1.0, 7.0, 2.0)), made((2.0, 8.0, 4.0)))
    assert found.loss == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_scores_without_logits_give_no_divergence(llama: Path, two_bits: Path, text: Path) -> None:
    spec = VerifySpec(text=str(text), window=64, max_documents=3)
    full: Evaluation = qexport.evaluate(llama, spec)
    assert qexport.verify(full, two_bits, spec).candidate.divergence is None
    assert qexport.verify(llama, two_bits, spec).candidate.divergence is not None


def test_the_hash_of_tokens_sees_what_is_scored() -> None:
    one, other = [ScoredWindow([1, 2, 3], 1, 0)], [ScoredWindow([1, 2, 3], 2, 0)]
    assert hash_of_tokens(one) != hash_of_tokens(other)
