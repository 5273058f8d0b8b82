"""report.html: one file that explains a merge to people who have never heard of FID."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmm_core.report.chart import mixing_chart
from dmm_core.report.pictures import Grids
from dmm_core.report.tables import (
    appeal_numbers,
    baseline_numbers,
    e,
    heat_table,
    mix_table,
    mixing_numbers,
    number,
    numbers_table,
    style_numbers,
    styles_table,
)
from dmm_core.shell import command

CSS = Path(__file__).parents[1] / "assets" / "report.css"


def page(report: Mapping[str, Any], grids: Grids, title: str) -> str:
    """The whole page as text; pictures are inside it, nothing is loaded from anywhere."""
    parts = [_merged(report), _headline(report)]
    if grids.styles is not None:
        text = _STYLES + (_BEFORE if grids.styles.before else "")
        text += _LAST_ROW if grids.styles.average is not None else ""
        parts.append(_section("Every style beside its teacher", text, styles_table(grids.styles)))
    if grids.mixes:
        parts.append(_section("Mixes", _MIXES, mix_table(grids.mixes, grids.weights)))
    if report.get("mixing"):
        shown = [mixing_chart(mixing) + mixing_numbers(mixing) for mixing in report["mixing"]]
        parts.append(_section("Mixes in figures", _MIXING, *shown))
    if report.get("appeal"):
        parts.append(_section("Prompts and taste", _APPEAL, appeal_numbers(report["appeal"])))
    parts += [_matrices(report), _average(report, grids), _made(report), _use(report, grids)]
    count = len(report["styles"])
    styles = f"{count} {'style' if count == 1 else 'styles'} in one checkpoint: {', '.join(report['styles'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(title)}</title><style>{CSS.read_text(encoding='utf-8')}</style></head>\n"
        f'<body><main><header><h1>{e(title)}</h1><p class="lead">{e(styles)}</p></header>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


_STYLES = (
    "Teacher and student drew the same subject from the same noise. The nearer the two rows of a style are to each "
    "other, the better the merge."
)
_BEFORE = (
    " Styles were added to an earlier student: the rows in the middle are what it drew before, in its default style "
    "where it did not have the style."
)
_MIXING = (
    "How far the pictures of each mix lie from both teachers. A good slider leads steadily away from the first and "
    "towards the second; beside it, averages of the two teachers' weights in the same proportion."
)
_APPEAL = (
    "How well the pictures fit their prompts (CLIP score) and how much people like such pictures (PickScore, aesthetic "
    "score), by networks that were trained to tell; higher is better. The mix takes all styles alike, as the weight "
    "average does with the checkpoints."
)
_LAST_ROW = " The last row is what averaging the checkpoints' weights gives."
_MIXES = (
    "The weights at the top move from the first style to the second, with the same subject and noise: 0 is all first "
    "style, 1 is all second. In between lie styles that no teacher had."
)


def _section(heading: str, text: str, *content: str) -> str:
    return f"<section><h2>{e(heading)}</h2><p>{e(text)}</p>{''.join(content)}</section>"


def _merged(report: Mapping[str, Any]) -> str:
    entries = report.get("merged") or [{"name": name} for name in report["styles"]]
    rows = [[str(x.get("name", "")), str(x.get("teacher") or "–"), str(x.get("sha256") or "–")[:12]] for x in entries]
    text = (
        "Each checkpoint below was a teacher. One student of the same size learned to predict what each of them "
        "predicts, and which one to follow is a setting, the style."
    )
    return _section("What was merged", text, numbers_table(("style", "teacher", "sha256"), rows, "plain"))


def astray_text(alike: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """How many pictures are in a wrong style, as a sentence; reports of before it was counted say nothing."""
    if "astray" not in alike:
        return ""
    count, drawn = sum(map(len, alike["astray"])), report["images_per_style"] * len(alike["astray"])
    return f" {count} of {drawn} pictures {'is' if count == 1 else 'are'} nearer to another teacher's."


def _headline(report: Mapping[str, Any]) -> str:
    error, gap, average = report.get("ratio_error"), report["gap_closed"].get("mean"), report["weight_average"]
    wins = [row["nearest_own_teacher"] for row in report.get("per_style", ())]
    cards = [
        _card(
            f"{report['ratio']:.2f}", "" if error is None else f"± {error:.2f}", "Distance from the teachers",
            "times as far from the teachers' pictures as the teachers' own are when they draw again with other seeds. "
            f"1.00 means that {report['images_per_style']} pictures a style cannot tell it from them; more might.",
        )
    ]  # fmt: skip
    if average.get("ratio") is not None:
        text = "is the same figure for simply averaging the checkpoints' weights, the usual way to merge them."
        cards.append(_card(f"{average['ratio']:.2f}", "", "Plain weight average", text))
    if gap is not None:
        text = (
            "of the error that the weight average makes when it predicts what a teacher would predict is gone. "
            "100 % would be a perfect copy of every teacher."
        )
        cards.append(_card(f"{100 * gap:.0f} %", "", "Gap closed", text))
    if wins:
        text = "styles look more like their own teacher than like any other: styles do not run into each other."
        cards.append(_card(f"{sum(wins)} of {len(wins)}", "", "Styles kept apart", text))
    if alike := report.get("same_seed"):
        mine, average = alike["student"], alike.get("average")
        text = (
            "is how far a picture is from the one that its teacher draws with the same prompt and seed; 0 is the very "
            "same picture, 1 as far as with another seed."
            + (f" The weight average's are at {average['mean']:.2f}." if average else "")
            + astray_text(mine, report)
        )
        cards.append(_card(f"{mine['mean']:.2f}", f"± {mine['error']:.2f}", "Picture by picture", text))
    if apart := report.get("separation"):
        text = (
            "of the student's pictures are recognised as their style, by a classifier that knows the teachers' alone. "
            f"Of the teachers' own it recognises {100 * apart['teachers']:.0f}\u00a0%; "
            f"chance would be {100 * apart['chance']:.0f}\u00a0%."
        )
        cards.append(_card(f"{100 * apart['student']:.0f} %", "", "Style recognised", text))
    return _section(
        "In figures",
        f"Distances are measured between sets of {report['images_per_style']} pictures a style, as {report['metric']}; "
        "smaller is nearer. Figures from other extractors or other numbers of pictures cannot be compared with these.",
        f'<div class="figures">{"".join(cards)}</div>',
    )


def _card(value: str, spread: str, name: str, text: str) -> str:
    small = f" <small>{e(spread)}</small>" if spread else ""
    return f'<div class="figure"><strong>{e(name)}</strong><b>{e(value)}{small}</b><p>{e(text)}</p></div>'


def _matrices(report: Mapping[str, Any]) -> str:
    styles = report["styles"]
    largest = max(max(map(max, report["matrix"])), max(map(max, report["reference"])))
    text = (
        "Rows draw, columns are the teachers they are compared with. A good merge has small (dark) numbers from the "
        "upper left to the lower right, nearly as small as the teachers' own, and large ones elsewhere. "
        "The nearest teacher of each row is outlined."
    )
    pair = (
        heat_table(f"Student, sum of the diagonal {number(report['fid_t'])}", styles, report["matrix"], largest),
        heat_table(
            f"Teachers with other seeds, {number(report['fid_t_reference'])}", styles, report["reference"], largest
        ),
    )
    kid = ""
    if report.get("kid"):
        rows = [[name, *(f"{v:.4f}" for v in row)] for name, row in zip(styles, report["kid"], strict=True)]
        told = "The same comparison by KID, which few pictures do not distort; near 0 is the same."
        table = numbers_table(["", *styles], rows)
        kid = f"<details><summary>Kernel distances (KID)</summary><p>{told}</p>{table}</details>"
    floor = (
        "Floor: one half of a teacher's pictures against the other half; half as many pictures, of other subjects, so "
        "it can lie above the distances of the same subjects. ± is one standard deviation over "
        f"{report.get('bootstrap', 0)} resamplings of the subjects."
    )
    tables = f'<div class="scroll" tabindex="0"><div class="pair">{"".join(pair)}</div></div>'
    return _section(
        "Who is near whom", text, tables, style_numbers(report), f'<p class="note">{e(floor)}</p>' + kid
    )  # fmt: skip


def _average(report: Mapping[str, Any], grids: Grids) -> str:
    average = report["weight_average"]
    if average.get("ratio") is None:
        return ""
    spread = f" ± {average['ratio_error']:.2f}" if average.get("ratio_error") is not None else ""
    seen = grids.styles is not None and grids.styles.average is not None
    return _section(
        "The weight average beside",
        f"Averaging the {len(report['styles'])} checkpoints' weights gives one blend that has no styles to choose "
        f"from: its distance ratio is {average['ratio']:.2f}{spread}, the merge's is {report['ratio']:.2f}."
        + (" Its pictures are the last row of the styles." if seen else ""),
        baseline_numbers(report) if report.get("baselines") else "",
    )


def _made(report: Mapping[str, Any]) -> str:
    facts = {
        "device": report.get("device"),
        "time": duration(report["seconds"]) if report.get("seconds") is not None else None,
        "samples seen": f"{report['samples_seen']:,}" if report.get("samples_seen") is not None else None,
        "version": report.get("commit"),
        "features": report["extractor"],
        "pictures a style": report["images_per_style"],
        "sampler": ", ".join(
            str(v) if k == "name" else f"{k.replace('_', ' ')} {v}" for k, v in (report.get("sampler") or {}).items()
        ),
    }
    told = "".join(f"<dt>{e(name)}</dt><dd>{e(value)}</dd>" for name, value in facts.items() if value not in (None, ""))
    recipe = report.get("recipe")
    shown = ""
    if recipe:
        text = recipe if isinstance(recipe, str) else json.dumps(recipe, indent=2, ensure_ascii=False, default=str)
        shown = f"<details><summary>Recipe</summary><pre><code>{e(text)}</code></pre></details>"
    return f"<section><h2>How it was made</h2><dl>{told}</dl>{shown}</section>"


def _use(report: Mapping[str, Any], grids: Grids) -> str:
    name = Path(str(report.get("file") or "student.safetensors")).name
    file, styles = grids.file or name, list(report["styles"])
    mix = ["--style", *(f"{style}={w}" for style, w in zip(styles[:2], ("0.7", "0.3"), strict=False))]
    steps = (
        f"<b>ComfyUI:</b> put <code>{e(name)}</code> into <code>models/checkpoints</code> and load it with the nodes "
        "of the category DMM: Load DMM, Style Mix, Apply Style.",
        "<b>A1111, Forge, reForge:</b> put it into <code>models/Stable-diffusion</code> and open the DMM panel.",
        "<b>Anything else</b> loads it as an ordinary checkpoint and shows its default style.",
    )
    items = "".join(f"<li>{step}</li>" for step in steps)
    commands = "\n".join((
        command("generate", file, "--prompt", grids.prompt or "a photo of a cat", "--style", f"{styles[0]}=1"),
        command("mix", file, *mix, "--out", "style.safetensors"),
        command("mix", file, *mix, "--out", "checkpoint.safetensors", "--bake"),
    ))  # fmt: skip
    text = "The second makes a small style file for stock LoRA loaders (strength 1), the third an ordinary checkpoint."
    return (
        f"<section><h2>Using the file</h2><ul>{items}</ul>"
        f'<pre><code>{e(commands)}</code></pre><p class="note">{text}</p></section>'
    )


def duration(seconds: float) -> str:
    """Seconds in words, e.g. ``21 min 27 s``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
