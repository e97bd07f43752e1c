"""The page is that of the stored results, and a comparison goes on where it was stopped."""

from dataclasses import replace

import pytest
from test_protocol import Here

from lab import compare, worlds
from lab.protocol import TUNING_SEEDS, Results
from sd35.settings import UserError, parse
from toy import flow2d


def test_the_page_is_that_of_the_kept_results(tmp_path):
    results = Results(compare.Path("lab/results"))
    comparison = compare.Comparison(results, Here(tmp_path))
    written = (results.folder / "README.md").read_text("utf-8")
    tables = comparison.tables()
    assert written == compare.page(tables)
    figures = [results.folder / f"{name}.png" for name in ("family", "curves", "tiny")]
    assert all(f"({path.name})" in written and path.exists() for path in figures)
    for _, world, kind, name, _ in comparison.jobs():
        runs, seeds = results.of(world, kind).get(name), compare.module_of(world).SEEDS
        if runs is None:
            assert f"{name} in {world} ({kind})" in tables["missing"]
            continue
        assert kind != "reports" or (len(runs) == len(seeds) and not {*seeds} & {*TUNING_SEEDS})
    assert comparison.setting("words-2", "DGPO") == comparison.setting("words", "DGPO")
    with pytest.raises(UserError, match="words began with another pretrained pipeline"):
        results.check_origin("words", "-another")


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch, capsys):
    """--full with one method, few settings and short runs, when the results have been lost."""
    rungs, calls, run = ((1, 0.5, 1), (2, 1.0, 1)), [], worlds.run
    plan = replace(worlds.PLAN, drawn=1, rounds=1, most_rounds=1, rungs=rungs)
    small = replace(worlds.make("ring-2"), budget=20_000)

    def counted(*task):
        calls.append(task)
        return run(*task)

    for name, value in (("PLAN", plan), ("SEEDS", (0, 1)), ("run", counted)):
        monkeypatch.setattr(worlds, name, value)
    monkeypatch.setattr(worlds, "make", lambda name: small)
    monkeypatch.setattr(flow2d, "PRETRAINING_STEPS", 30)
    monkeypatch.setattr(compare, "Computer", Here)
    worlds.pretrained.cache_clear()
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    full = ["--full", "--worlds", "ring-2", "--methods", "DGPO", *folders]
    compare.main(full)
    page, before = (tmp_path / "results" / "README.md").read_text("utf-8"), len(calls)
    assert "| ring-2 | DGPO | 0 of 2 | - |" in page and "--full`: Bounded DGPO in" in page
    (tmp_path / "results" / "ring-2.json").unlink()
    compare.main(full)
    assert (tmp_path / "results" / "README.md").read_text("utf-8") == page and len(calls) == before

    capsys.readouterr()
    compare.main(["--worlds", "ring-2", "--methods", "DGPO", "--seed", "5", *folders])
    assert capsys.readouterr().out.count("| ring-2 | DGPO | ") == 2  # as reported, and now
    assert [task[1] for task in calls[before:]] == [5, 6, 7]
    worlds.pretrained.cache_clear()


@pytest.mark.parametrize("flags", ["--worlds magic", "--methods magic", "--table"])
def test_bad_flags_are_one_sentence(flags):
    with pytest.raises(UserError, match=f"^{flags.split()[0]}(: there is no magic|.*--full)"):
        parse(compare.Arguments, flags.split())
