"""Pictures in the terminal: bars, curves, a grid of attention weights; and curves as a png."""
import math
import unicodedata


def width(text):
    """Columns that a text takes in a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fill(text, columns):
    """Return the text with spaces behind it, up to so many columns."""
    return text + " " * max(0, columns - width(text))


def bar(value, top, columns=30):
    """A bar as long as value is of top."""
    return "█" * round(columns * max(0.0, float(value)) / max(top, 1e-9))


def print_bars(rows, columns=30):
    """rows: [(label, value)]; print a bar for each."""
    label_width = max(width(label) for label, _ in rows)
    top = max(value for _, value in rows)
    for label, value in rows:
        print(f"  {fill(label, label_width)} {value:7.3f} {bar(value, top, columns)}")


def shade(weight):
    """A block as dark as a weight from 0 to 1."""
    return " ░▒▓█"[min(4, math.ceil(4 * weight - 0.2))]


def print_curves(curves, rows=12, columns=64):
    """curves: {one character: [(x, y)]}; print them in one frame."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    left = min(x for x, _ in points)
    right = max(x for x, _ in points)
    low = min(y for _, y in points)
    high = max(y for _, y in points)
    grid = [[" "] * columns for _ in range(rows)]
    for mark, curve in curves.items():
        for x, y in curve:
            if math.isfinite(y):
                column = round((x - left) / max(right - left, 1e-9) * (columns - 1))
                row = round((high - y) / max(high - low, 1e-9) * (rows - 1))
                grid[row][column] = mark
    for number, line in enumerate(grid):
        value = high - (high - low) * number / (rows - 1)
        label = f"{value:8.2f}" if number in (0, rows // 2, rows - 1) else " " * 8
        print(f"{label} │{''.join(line)}")
    print(" " * 9 + "└" + "─" * columns)
    print(" " * 10 + f"{left:g}".ljust(columns - 6) + f"{right:g}".rjust(6))


def save_curves(curves, title, x_name, y_name, path):
    """curves: {name: [(x, y)]}; write a png. Returns False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    for (name, curve), color in zip(curves.items(), ("#2a6f97", "#c1121f")):
        axes.plot(*zip(*curve), color=color, label=name, linewidth=1.6)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
    return True
