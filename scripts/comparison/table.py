"""The table and the plot of scripts/methods."""

import statistics

# Versions that were read: vLLM 0.33.0, SGLang 0.5.23, llama.cpp b11434. For `export --check`, which knows more, see engines.md.
ENGINES = {
    "medusa": "vLLM up to 0.32",
    "eagle3": "vLLM, SGLang, llama.cpp",
    "peagle": "vLLM",
    "dflash": "vLLM, SGLang, llama.cpp",
    "dflash2": "vLLM, SGLang, llama.cpp",
    "dspark": "vLLM, SGLang, llama.cpp",
    "lilicorr": "vLLM, SGLang",
    "domino": "SGLang",
    "xpress": "vLLM",
}
TITLES = {
    "medusa": "Medusa", "eagle3": "EAGLE-3", "peagle": "P-EAGLE", "dflash": "DFlash", "dflash2": "DFlash2",
    "dspark": "DSpark", "lilicorr": "LiLiCorr", "domino": "Domino", "xpress": "XPress",
}


def title(row: dict) -> str:
    base, _, variant = row["method"].partition("+")
    return " + ".join(filter(None, [TITLES.get(base, base), variant]))


def over_seeds(row: dict, of) -> list[float]:
    """A figure of every training of a method; those that are not there are left out."""
    return [value for run in row["runs"] if (value := of(run)) is not None]


def where_first(row: dict, kind: str, key: str) -> list[float]:
    """A figure of speed: of the trainings that were decoded on the first one's machine."""
    first = row["runs"][0][kind].get("machine")
    return over_seeds(row, lambda run: run[kind][key] if run[kind].get("machine") == first else None)


def figure(values: list[float], digits: int, unit: str = "") -> str:
    """Their mean, and how far the furthest is from it."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    text = f"{mean:.{digits}f}"
    return (f"{text} ± {spread:.{digits}f}" if len(values) > 1 else text) + unit


def cells(row: dict) -> list[str]:
    """A line of the table."""
    tau = lambda kind: over_seeds(row, lambda run: run[kind]["tau"])  # noqa: E731
    speed = lambda kind, key: where_first(row, kind, key)  # noqa: E731
    # As timed before the runs: their number of steps follows from it.
    step = row["timing"]["data"] + row["timing"]["draft"]
    faults = sum(run[kind]["lossless"]["faults"] for run in row["runs"] for kind in ("chain", "tree"))
    return [
        title(row) + (" (!)" if faults else ""),
        f"{row['timing']['parameters'] / 1e6:.1f} M",
        f"{1 / step:.2f}",
        str(row["runs"][0]["train"]["steps"]),
        figure(tau("chain"), 2),
        figure(tau("tree"), 2),
        f"{figure(speed('chain', 'draft_milliseconds'), 1)} ms, {100 * statistics.mean(speed('chain', 'draft_share')):.0f} %",
        figure(speed("chain", "speedup"), 2),
        figure(speed("tree", "speedup"), 2),
        ENGINES.get(row["method"].partition("+")[0], "-"),
        str(len(row["runs"])),
    ]


HEADINGS = [
    "method", "parameters", "steps/s", "steps", "tau, chain", "tau, tree", "a draft round (chain)", "speed-up, chain",
    "speed-up, tree", "served by", "seeds",
]


def table(rows: list[dict], facts: dict) -> str:
    """docs/methods.md."""
    rows = sorted(rows, key=lambda row: -statistics.mean(over_seeds(row, lambda run: run["chain"]["tau"])))
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    variants = "".join(f"- **{title({'method': name})}**: `{'`, `'.join(settings)}`.\n" for name, settings in facts["variants"].items())
    took = [row["runs"][0]["train"]["seconds"] / 60 for row in rows]  # others may have shared the machine
    model = "A small random model" if facts["tiny"] else "SmolLM2-135M-Instruct"
    data = f"conversations of {' and '.join(f'`{file}`' for file in facts['data'])}" if facts["data"] else "conversations"
    return f"""# Methods compared

Written by `scripts/methods`; do not edit. {model}, float32, {facts['threads']} threads; every method was trained for
{facts['minutes']:g} minutes on the same {data}
with its recipe, `configs/smollm2-135m-METHOD.json`, and then decoded the same {facts['limit']} questions, none of which it was trained on, greedily, {facts['new_tokens']} tokens at most.
{facts['machine']}, {facts['date']}.

![acceptance length by method](methods.svg)

{body}

{variants}- **tau** is the tokens that a verification of the target yields, its own one included. A chain is one guess for every place of
  a block (Medusa: of every head); a tree is `{facts['tree']}`, for Medusa a static one of 12 guesses.
- **A draft round** is what guessing takes between two verifications, and its share of the time of decoding.
- **Speed-up** is against plain decoding of the same questions by the same program. On a processor a pass over several tokens
  costs more than one over one token, which makes drafts look worse than on a GPU.
- **Steps** are what fits into the time as timed before on a few steps; the trainings with the first seed then took
  {min(took):.1f} to {max(took):.1f} minutes. Time is that of training alone: evaluations, checkpoints and loading are left out{facts['states']}.
- Behind ± stands how far the furthest seed is from the mean, where there are several. (!) marks answers that plain decoding does
  not give.
- Minutes are little: recipes for real sizes train for hours on thousands of times as much text, and the
  order of the methods may be another one there.
- Drafts whose head allows it (Medusa, EAGLE-3, P-EAGLE, DFlash, DSpark, XPress) may have a vocabulary of their own; the recipe says
  so. DFlash2, LiLiCorr and Domino name all tokens of the target, which costs steps here, where the vocabulary is large beside
  the model.
- SmolLM2 has no mask token. Block drafts take `<empty_output>` (16), one of the reserved tokens of its tokenizer, which no
  conversation contains: its row of the embedding is a usual one, and no text can hold it.
"""


def plot(rows: list[dict]) -> str:
    """docs/methods.svg: bars of the acceptance length, chain and tree, with the speed-ups behind them."""
    rows = sorted(rows, key=lambda row: -statistics.mean(over_seeds(row, lambda run: run["chain"]["tau"])))
    left = max(90, 16 + 7 * max(len(title(row)) for row in rows))
    width, height, gap = 420, 14, 12
    tau = {
        (row["method"], kind): over_seeds(row, lambda run, kind=kind: run[kind]["tau"])
        for row in rows for kind in ("chain", "tree")
    }
    most = max(max(values) for values in tau.values())
    # From 1, where nothing was accepted.
    scale = width / max(0.1, most - 1)
    total = 40 + len(rows) * (2 * height + gap) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="{total}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<rect x="{left}" y="10" width="12" height="12" fill="#1f4e79"/><text x="{left + 18}" y="20">chain</text>',
        f'<rect x="{left + 70}" y="10" width="12" height="12" fill="#8fb8de"/><text x="{left + 88}" y="20">tree</text>',
        f'<text x="{left + 140}" y="20" fill="#555">tokens a verification (speed-up)</text>',
    ]
    for index, row in enumerate(rows):
        top = 36 + index * (2 * height + gap)
        parts.append(f'<text x="{left - 8}" y="{top + height + 4}" text-anchor="end">{title(row)}</text>')
        for place, (kind, colour) in enumerate((("chain", "#1f4e79"), ("tree", "#8fb8de"))):
            values = tau[row["method"], kind]
            mean, y = statistics.mean(values), top + place * height
            bar, middle = max(0.0, (mean - 1) * scale), y + height / 2 - 1
            parts.append(f'<rect x="{left}" y="{y}" width="{bar:.1f}" height="{height - 2}" fill="{colour}"/>')
            if len(values) > 1:
                ends = [left + (value - 1) * scale for value in (min(values), max(values))]
                parts.append(
                    f'<line x1="{ends[0]:.1f}" y1="{middle}" x2="{ends[1]:.1f}" y2="{middle}" stroke="black"/>'
                )
            end = left + max(bar, (max(values) - 1) * scale) + 6
            speed = figure(where_first(row, kind, "speedup"), 2, "x")
            parts.append(f'<text x="{end:.1f}" y="{y + height - 3}">{mean:.2f} ({speed})</text>')
    axis = total - 22
    step = 0.5 if most - 1 > 1.2 else 0.2 if most - 1 > 0.5 else 0.1
    parts.append(f'<line x1="{left}" y1="{axis}" x2="{left + width}" y2="{axis}" stroke="#555"/>')
    for number in range(int((most - 1) / step + 1e-9) + 1):
        x = left + number * step * scale
        parts.append(f'<line x1="{x:.1f}" y1="{axis}" x2="{x:.1f}" y2="{axis + 4}" stroke="#555"/>')
        parts.append(f'<text x="{x:.1f}" y="{axis + 16}" text-anchor="middle" fill="#555">{1 + number * step:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
