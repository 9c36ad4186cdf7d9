"""Draw which notebook waits for which, as the workflow says: `make paper-graph` writes workflow/graph.png.

Reads what `snakemake --rulegraph` prints. Rules with the same neighbors and the same name but for a number
share a box,
so that ten tables and figures are two.
"""
import re
import sys
from pathlib import Path

WHAT = {'styles': 'descriptions by style', 'describe': 'descriptions', 'train': 'one job per variant, seed',
        'collect': 'runs.csv, intervals', 'table1-5': '.csv .md .tex', 'fig1-5': '.pdf .png',
        'audit': 'audit.csv .md'}

W = .9      # half the width of a box


def read_graph(dot: str) -> tuple[dict[str, str], set[tuple[str, str]]]:   # id -> rule, edges
    "Rules and edges of a rule graph, without its target `all`."
    names = {i: n for i, n in re.findall(r'(\d+)\[label = "(\w+)', dot) if n != 'all'}
    return names, {(a, b) for a, b in re.findall(r'(\d+) -> (\d+)', dot) if {a, b} <= set(names)}


def boxes(names: dict[str, str], edges: set[tuple[str, str]]) -> tuple[list[str], set[tuple[str, str]]]:
    "The same with numbered rules of the same neighbors as one."
    groups: dict[tuple, list[str]] = {}
    for i, n in names.items():
        near = frozenset(a for a, b in edges if b == i), frozenset(b for a, b in edges if a == i)
        groups.setdefault((n.rstrip('0123456789'), *near), []).append(i)
    label = {}
    for (stem, *_), members in groups.items():
        numbers = sorted(int(names[i].removeprefix(stem) or 0) for i in members)
        label |= dict.fromkeys(members, f'{stem}{numbers[0]}-{numbers[-1]}' if len(members) > 1
                               else names[members[0]])
    return list(dict.fromkeys(label.values())), {(label[a], label[b]) for a, b in edges}


def layers(names: list[str], edges: set[tuple[str, str]]) -> dict[str, int]:
    "How many boxes come before each at most."
    depth: dict[str, int] = {}
    def of(n):
        if n not in depth: depth[n] = max((1 + of(a) for a, b in edges if b == n), default=0)
        return depth[n]
    for n in names: of(n)
    return depth


def draw(names: list[str], edges: set[tuple[str, str]], path: Path) -> None:
    "Layers from left to right; an edge that another way goes too is left out."
    import matplotlib as mpl
    mpl.use('agg')
    import matplotlib.pyplot as plt
    depth, at = layers(names, edges), {}
    for d in sorted({*depth.values()}):
        column = sorted((n for n in names if depth[n] == d), reverse=True)
        for k, n in enumerate(column): at[n] = d*2.3, (k - (len(column) - 1)/2)*.85
    fig, ax = plt.subplots(figsize=(7, 2.6), layout='constrained')
    for n, (x, y) in at.items():
        ax.text(x, y + (.12 if n in WHAT else 0), n, ha='center', va='center', fontsize=9, weight='bold',
                zorder=3)
        ax.text(x, y - .12, WHAT.get(n, ''), ha='center', va='center', fontsize=7, color='0.25', zorder=3)
        ax.add_patch(plt.Rectangle((x - W, y - .34), 2*W, .68, facecolor='#eef3f8', edgecolor='#1f4e8c',
                                   linewidth=1, zorder=2))
    for a, b in sorted(edges):
        if depth[b] != depth[a] + 1: continue
        arrow = dict(arrowstyle='-|>', color='0.35', linewidth=1, shrinkA=0, shrinkB=0)
        ax.annotate('', (at[b][0] - W, at[b][1]), (at[a][0] + W, at[a][1]), arrowprops=arrow)
    xs, ys = zip(*at.values())
    ax.set(xlim=(-W - .05, max(xs) + W + .05), ylim=(min(ys) - .4, max(ys) + .4))
    ax.set_axis_off()
    fig.savefig(path, dpi=150, metadata={'Software': None})


if __name__ == '__main__': draw(*boxes(*read_graph(sys.stdin.read())), Path(sys.argv[1]))
