"""What the tab shows of an activity, a plan and a file, as HTML. No gradio, no webui."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dmm_core.commands.plan import GIB
from dmm_core.progress import duration
from dmm_core.studio.desk import Activity

IDLE = '<div class="dmm-card dmm-idle" data-live="0">Nothing is running.</div>'


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def card(activity: Activity | None) -> str:
    """How far the activity is. ``data-live`` tells the page's script how often to ask."""
    if activity is None:
        return IDLE
    view, live = activity.view, activity.running
    line = view.line() if view is not None and live else activity.line
    if live and activity.cancelled.is_set():
        line = "Saves what was learnt, then stops." if view is not None else "Stops."
    parts = [
        f'<div class="dmm-head"><b>{esc(activity.title)}</b><span class="dmm-state dmm-{activity.state}">'
        f"{activity.state}</span></div>"
    ]
    if live:
        parts.append(_bar(view.share if view is not None else None))
    parts.append(f'<div class="dmm-line">{esc(line)}</div>')
    if view is not None and view.losses:
        parts.append(losses(view.losses))
    if view is not None:
        parts += [f'<div class="dmm-note">{esc(warning)}</div>' for warning in view.warnings[-3:]]
    if activity.plan:
        parts.append(details("Plan", table(plan_rows(activity.plan)) + notes(activity.plan), view is None))
    if view is None and len(activity.lines) > 1:
        parts.append(details("What it said", f"<pre>{esc(chr(10).join(activity.lines[-60:]))}</pre>", live))
    return f'<div class="dmm-card" data-live="{int(live)}">{"".join(parts)}</div>'


def _bar(share: float | None) -> str:
    if share is None:
        return '<div class="dmm-bar dmm-unknown"><div></div></div>'
    return f'<div class="dmm-bar" role="progressbar"><div style="width:{100 * share:.1f}%"></div></div>'


def losses(values: Mapping[str, float]) -> str:
    """A bar for each style's loss, relative to the largest."""
    most = max(values.values(), default=0.0) or 1.0
    rows = "".join(
        f'<div class="dmm-loss"><span>{esc(name)}</span><i style="width:{100 * max(loss, 0) / most:.0f}%"></i>'
        f"<em>{loss:.4f}</em></div>"
        for name, loss in values.items()
    )
    return f'<div class="dmm-losses"><div class="dmm-small">Loss of each style</div>{rows}</div>'


def plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A plan (``dmm plan --json``) in words."""
    size = lambda key: f"{plan[key] / GIB:.2f} GiB"  # noqa: E731
    rows = [
        ("Styles", ", ".join(plan["styles"])),
        ("Model", f"{plan['family']}, {plan['unet_parameters'] / 1e6:.0f} M parameters in the UNet"),
        ("Device", f"{plan['device']}, {plan['precision']}"),
        ("Work", f"{plan['steps']:,} steps, {plan['samples']:,} samples"),
        ("Disk", size("disk_bytes")),
    ]
    if plan.get("peak_bytes") is None:
        rows.append(("Memory", f"about {size('memory_bytes')} beside activations"))
    else:
        rows.append(("Memory", f"{size('peak_bytes')} at most, RAM {size('ram_bytes')}"))
    if plan.get("seconds"):
        rows.append(("Time", f"about {duration(plan['seconds'])} ({plan['seconds_per_step']:.2f} s a step)"))
    if plan.get("changes"):
        rows.append(("To fit", ", ".join(f"{key} {value}" for key, value in plan["changes"].items())))
    return rows


def notes(plan: Mapping[str, Any]) -> str:
    told = list(plan.get("warnings") or ())
    if plan.get("fits") is False:
        told.append("It does not fit this device, whatever is changed: fewer checkpoints, or a larger device.")
    return "".join(f'<div class="dmm-note">{esc(line)}</div>' for line in told)


def table(rows: Iterable[tuple[str, object]]) -> str:
    cells = "".join(f"<tr><th>{esc(name)}</th><td>{esc(value)}</td></tr>" for name, value in rows if value)
    return f'<table class="dmm-table">{cells}</table>'


def details(title: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{esc(title)}</summary>{content}</details>"


def pictures(made: Sequence[tuple[str, bytes]]) -> str:
    """Pictures with their captions, in the page itself: no file is served."""
    return "".join(_figure(caption, data) for caption, data in made)


def _figure(caption: str, data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure class="dmm-picture"><div><img src="{uri}" alt="{esc(caption)}"></div>'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


def inspected(found: Mapping[str, Any]) -> str:
    """What ``inspect_file`` found."""
    counts = {name: n for name, n in found["parameters"].items() if n}
    kinds = {"dmm": "DMM file", "style": "style file", "lora": "LoRA", "checkpoint": "checkpoint"}
    rows: list[tuple[str, object]] = [
        ("Kind", kinds.get(found["kind"], "unknown")),
        ("Problem", found["problem"]),
        ("Model", found["family"]),
        ("Prediction", found["prediction_type"]),
        ("Parameters", ", ".join(f"{name} {n / 1e6:,.1f} M" for name, n in counts.items())),
        ("Type", found["dtype"] or ", ".join(f"{name} × {n}" for name, n in found["dtypes"].items())),
        ("Size", f"{found['size'] / 2**20:,.1f} MiB, {found['tensors']:,} tensors"),
        ("Default style", _mix(found["default_style"])),
    ]
    if found["non_finite"] is not None:
        bad = ", ".join(f"{entry['tensor']} ({entry['count']})" for entry in found["non_finite"][:20])
        rows.append(("NaN, infinity", bad or "none"))
    styles = "".join(_style(style) for style in found["styles"])
    meta = {key: _short(value) for key, value in found["metadata"].items()}
    return (
        f'<div class="dmm-found">{table(rows)}'
        + (f'<div class="dmm-styles">{styles}</div>' if styles else "")
        + (details("Metadata", table(meta.items())) if meta else "")
        + "</div>"
    )


def _mix(mix: Any) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in mix.items()) if isinstance(mix, Mapping) else ""


def _style(style: Mapping[str, Any]) -> str:
    uri = str(style.get("thumbnail") or "")
    image = f'<img src="{esc(uri)}" alt="">' if uri.startswith("data:image/") else "<i></i>"
    teacher = f"<small>{esc(style['teacher'])}</small>" if style.get("teacher") else ""
    return f'<div class="dmm-chip">{image}<span>{esc(style.get("name", ""))}{teacher}</span></div>'


def _short(value: object, width: int = 300) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else text[:width] + " …"
