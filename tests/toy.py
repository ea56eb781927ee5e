"""The toy data: street scenes in StreetHazards' folder layout and label ids, drawn by a program.

    python tests/toy.py data/toy_b --seed 1        # another drawing, with the same command the same bytes everywhere

Street scenes drawn back to front at twice the size, in StreetHazards' folder layout and label ids. Test images hold
things that no training image shows: 12 silhouettes, 5 patterns, half of their colours taken from known things.
One camera rule, with k = 1 / depth (1 at the bottom edge, 0 at the horizon hy): a point X to the side and h above
the ground is seen at (vx + X k, hy + (H - hy) k - h k). Every machine must draw the same pixels, so there are only
+ - * / and comparisons on float64 (exact under IEEE 754; no sin, exp, pow), and one rounding, at the end.
"""
import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

TOY_SIZE = 108, 192    # H, W: 16:9 like StreetHazards
BACK, BUILDING, FENCE, OTHER, PERSON, POLE, LINE, ROAD, WALK, PLANT, CAR, WALL, SIGN, ODD = range(1, 15)  # PNG ids
TOY_TONES = np.array([[200, 200, 198], [38, 40, 44], [150, 30, 32], [40, 62, 120], [120, 124, 128], [190, 170, 130],
                  [60, 100, 80], [225, 225, 220], [170, 90, 40.]])    # of cars, clothes and distant houses
WHITE, BLACK, RED = (238, 238, 235), (24, 24, 26), (200, 30, 35)
TOY_GLYPHS = [np.array([[c == "1" for c in row] for row in g.split()]) for g in (    # Z, E, X, R, +, ?
    "11111 00010 00100 01000 11111", "11111 10000 11110 10000 11111", "10001 01010 00100 01010 10001",
    "11110 10001 11110 10010 10001", "00100 00100 11111 00100 00100", "01110 10001 00110 00000 00100")]


def toy_noise(rng, cell):
    """Value noise in [-1, 1], (2H, 2W): a random grid with a node every `cell` pixels, smoothly interpolated."""
    grid = 2 * rng.random((2 * TOY_SIZE[0] // cell + 2, 2 * TOY_SIZE[1] // cell + 2)) - 1
    for n in TOY_SIZE:    # rows, then (transposed) columns, transposed back
        i, t = np.arange(2 * n) // cell, np.arange(2 * n)[:, None] % cell / cell
        grid = (grid[i] + (grid[i + 1] - grid[i]) * (t * t * (3 - 2 * t))).T
    return grid


# Shapes: functions from u in [-1, 1] (left to right) and v in [0, 1] (foot to top), both (h, w), to a mask (h, w).
def ell(cu=0, cv=.5, ru=1, rv=.5):
    return lambda u, v: (u - cu) * (u - cu) / (ru * ru) + (v - cv) * (v - cv) / (rv * rv) <= 1


def box(u0=-1, v0=0, u1=1, v1=1):
    return lambda u, v: (u >= u0) & (u <= u1) & (v >= v0) & (v <= v1)


def poly(*points):
    edges = [(a, b, (c - a) / (d - b), d) for (a, b), (c, d) in zip(points, points[1:] + points[:1]) if b != d]
    return lambda u, v: np.logical_xor.reduce([((b > v) != (d > v)) & (u < a + t * (v - b)) for a, b, t, d in edges])


def join(*shapes):
    return lambda u, v: np.logical_or.reduce([f(u, v) for f in shapes])


def toy_paint(s, window, mask, cls, rgb, shade):
    """Paint class `cls` in colour rgb (3,) * shade (scalar or (h, w)) where mask (h, w) is set in the window."""
    shade = np.broadcast_to(shade * (1 + .12 * s["grain"][window]), mask.shape)[mask]
    s["img"][window][mask] = shade[:, None] * rgb
    s["ids"][window][mask] = cls


def toy_draw(s, x, y, w, h, cls, *parts):
    """Draw (shape, colour) parts with the foot at (x, y), w wide and h high; class None darkens: a shadow."""
    (y0, y1), (x0, x1) = (np.clip([int(2 * a), int(2 * b)], 0, 2 * n)
                          for a, b, n in zip((y - h, x - w / 2), (y + 1, x + w / 2 + 1), TOY_SIZE))
    u, v = np.meshgrid(((np.arange(x0, x1) + .5) / 2 - x) * 2 / w, (y - (np.arange(y0, y1) + .5) / 2) / h)
    for shape, rgb in parts:
        mask = shape(u, v) & box()(u, v)
        if cls is None:
            s["img"][y0:y1, x0:x1][mask] *= rgb
        else:    # the sun lights one side of it
            toy_paint(s, (slice(y0, y1), slice(x0, x1)), mask, cls, rgb, 1 + .22 * s["sun"] * u)


def toy_facade(s, X, near, far, height, cls, rgb, rng):
    """A plane along the street at the side offset X, from k = near to far: a house, a wall, a fence or a hedge."""
    x0, x1 = sorted(int(min(max(2 * (s["vx"] + X * t), 0), 2 * TOY_SIZE[1])) for t in (near, far))
    window, k = (slice(None), slice(x0, x1)), ((np.arange(x0, x1) + .5) / 2 - s["vx"]) / X
    v = (s["hy"] + s["depth"] * k - (np.arange(2 * TOY_SIZE[0])[:, None] + .5) / 2) / k    # height, in k = 1 pixels
    mask, z, lumps = (v >= 0) & (v <= height), 130 / k, s["lumps"][window]
    if cls == BUILDING:
        a, b = z / rng.integers(26, 44) % 1, v / rng.integers(26, 40) % 1
        shade = 1 - (.3 + .3 * rng.random()) * ((abs(a - .5) < .23) & (abs(b - .55) < .25) & (v > 14))    # windows
    elif cls == WALL:    # bricks: every second course shifted by half a brick; a coping
        shade = 1 - .25 * ((v / 9 % 1 < .16) | ((z / 26 + v // 9 % 2 / 2) % 1 < .08) | (v > height - 5))
    elif cls == FENCE:    # two rails and pickets; the gaps show what stands behind
        mask &= (z / 24 % 1 < .7) | (abs(v - .2 * height) < 7) | (abs(v - .8 * height) < 7)
        shade = 1 - .3 * (z / 24 % 1 > .55)
    else:    # a hedge: a ragged top, dark at the foot
        mask &= v <= height * (.85 + .2 * lumps)
        shade = .65 + .35 * v / height + .3 * lumps
    toy_paint(s, window, mask, cls, rgb, shade * (1 - .2 * s["sun"] * (1 if X > 0 else -1)))


def toy_anomaly(s, x, y, k, rng):
    """One of 12 silhouettes in one of 5 patterns of 2 colours, standing, lying on its side or hanging in the air."""
    glyph = TOY_GLYPHS[rng.integers(6)]
    shape, wide = (
        (lambda u, v: glyph[np.clip(5 - 5 * v, 0, 4).astype(int), np.clip(2.5 * u + 2.5, 0, 4).astype(int)], .8),
        (join(ell(0, .55, .6, .22), ell(.75, .8, .25, .14), box(-.55, 0, -.35, .5), box(.3, 0, .5, .5),
              box(-.2, 0, -.05, .5), poly((.3, .6), (.6, .85), (.8, .75), (.5, .5))), 1.4),    # a four-legged animal
        (join(ell(.1, .5, .7, .32), poly((-.4, .5), (-1, .9), (-1, .1))), 1.5),    # a fish
        (join(ell(0, .35, .6, .35), ell(.1, .78, .38, .2), poly((.4, .8), (.95, .72), (.4, .68))), .8),    # a bird
        (poly((0, 1), (.24, .64), (1, .62), (.38, .38), (.6, 0), (0, .24), (-.6, 0), (-.38, .38), (-1, .62),
              (-.24, .64)), 1),    # a star
        (lambda u, v: ell()(u, v) & ~ell(0, .5, .55, .28)(u, v), 1),    # a ring
        (lambda u, v: ell()(u, v) & ~ell(.45, .6, .8, .42)(u, v), 1),    # a crescent
        (lambda u, v: ell()(u, v) & (s["lumps"][:u.shape[0], :u.shape[1]] > -.4), 1.1),    # a blob with holes
        (join(poly((-.75, 0), (-.15, 1), (.15, 1), (.75, 0)), box(-1, 0, 1, .1)), .7),    # a cone
        (join(ell(0, .65, 1, .35), box(-.06, 0, .06, .4)), .75),    # a balloon on a string
        (join(lambda u, v: ell()(u, v) & (v > .5), box(-.18, 0, .18, .5)), 1),    # a mushroom
        (box(), 1))[rng.integers(12)]
    n, pattern = rng.integers(2, 6), rng.integers(5)
    on = (lambda u, v: u > 9, lambda u, v: (n * (u + 1) // 1 + 2 * n * v // 1) % 2 > 0,    # plain, chequers
          lambda u, v: 2 * n * v // 1 % 2 > 0,    # stripes, rings, speckles
          lambda u, v: 2 * n * (u * u + (2 * v - 1) * (2 * v - 1)) // 1 % 2 > 0,
          lambda u, v: rng.random(u.shape) < .5)[pattern]
    known = s["img"][rng.integers(2 * TOY_SIZE[0]), rng.integers(2 * TOY_SIZE[1])].copy()
    a, b = (known if rng.random() < .5 else 255 * rng.random(3) for _ in range(2))    # a known thing's colour, or any
    h, pose = (28 + 34 * rng.random()) * k, rng.random()
    w, lift = h * wide, (pose > .8) * 60 * k * rng.random()
    toy_draw(s, x, y + 1, w, 6 * k, None, (ell(), .5))
    if pose < .25:
        up, shape, w, h = shape, lambda u, v: up(2 * v - 1, (u + 1) / 2), h, w
    toy_draw(s, x, y - lift, w, h, ODD, (shape, a), (lambda u, v: shape(u, v) & on(u, v), b))


def toy_thing(s, cls, x, y, k, rng):
    """Draw one thing of a known class, standing on its shadow at (x, y), at k = 1 / depth."""
    tone, tone2 = TOY_TONES[rng.integers(9, size=2)] * (.7 + .4 * rng.random())
    r, glass = rng.random(3), (38, 46, 58)
    w, h = {CAR: (60, 48) if r[0] < .6 else (108, 44), PERSON: (32, 68), POLE: (20, 92 + 30 * r[1]), OTHER: (20, 26),
            PLANT: (80 + 40 * r[0], 110 + 50 * r[1])}[cls]
    w, h = w * k, h * k
    toy_draw(s, x, y + 2, 1.1 * w, 7 * k + 2, None, (ell(), .5))
    if cls == CAR and r[0] < .6:    # seen from behind
        parts = [(join(box(-.95, 0, -.6, .3), box(.6, 0, .95, .3)), BLACK), (box(-1, .14, 1, .6), tone),
                 (poly((-.92, .6), (-.7, 1), (.7, 1), (.92, .6)), tone), (box(-.25, .25, .25, .4), WHITE),
                 (poly((-.76, .62), (-.6, .93), (.6, .93), (.76, .62)), glass),
                 (join(box(-.95, .4, -.65, .55), box(.65, .4, .95, .55)), RED)]
    elif cls == CAR:    # seen from the side
        parts = [(poly((-1, .18), (-1, .55), (-.6, .62), (-.4, 1), (.35, 1), (.65, .62), (1, .52), (1, .18)), tone),
                 (poly((-.52, .63), (-.36, .92), (-.06, .92), (-.06, .63)), glass),
                 (poly((.02, .63), (.02, .92), (.3, .92), (.52, .63)), glass)]
        parts += [(ell(u, .22, a, 1.3 * a), c) for u in (-.6, .6) for a, c in ((.17, BLACK), (.08, TOY_TONES[4]))]
    elif cls == PERSON:    # two legs, a coat, a head
        parts = [(poly((t - .3, 0), (t * .3 - .45, .5), (t * .3 + .45, .5), (t + .3, 0)), tone2 * .6)
                 for t in (-.15 - .4 * r[0], .15 + .4 * r[0])]
        parts += [(poly((-.75, .42), (-.95, .78), (-.4, .85), (.4, .85), (.95, .78), (.75, .42)), tone),
                  (ell(0, .91, .42, .1), np.array([205, 160, 125]) * (.45 + .6 * r[1]))]
    elif cls == PLANT:    # a tree
        parts = [(box(-.15, 0, .15, .6), (88, 66, 46))]
        parts += [(ell(1.2 * a - .6, .54 + .28 * b, .55, .18), np.array([60 + 40 * r[2], 110, 45]) * (.75 + .4 * b))
                  for a, b in rng.random((7, 2))]
    else:    # a pole or, as "other", a bin
        parts = [(box(), (60, 64, 70) if cls == OTHER else np.full(3, 108 + 40 * r[2]))]
    toy_draw(s, x, y, w, h, cls, *parts)
    if cls == POLE and r[0] < .85:
        shape, rim, face = ((ell(), RED, WHITE), (ell(), WHITE, (30, 75, 185)), (box(), WHITE, (20, 120, 75)),
                            (poly((-1, 0), (1, 0), (0, 1)), RED, WHITE),
                            (poly((0, 0), (1, .5), (0, 1), (-1, .5)), BLACK, (240, 200, 30)))[rng.integers(5)]
        toy_draw(s, x, y - h + 32 * k, 38 * k, 38 * k, SIGN, (shape, rim))
        toy_draw(s, x, y - h + 25 * k, 24 * k, 24 * k, SIGN, (shape, face))


def toy_scene(rng, anomaly):
    """One street scene: image (H, W, 3) uint8 and StreetHazards PNG ids (H, W) uint8; id 14 only if `anomaly`."""
    H, W = TOY_SIZE
    hy, vx, sun = H * (.34 + .1 * rng.random()), W * (.38 + .24 * rng.random()), 2 * rng.random() - 1
    y, x = (np.arange(2 * H)[:, None] + .5) / 2, (np.arange(2 * W) + .5) / 2
    s = dict(hy=hy, vx=vx, depth=H - hy, sun=sun, lumps=(toy_noise(rng, 12) + toy_noise(rng, 5)) / 2,
             grain=.4 * toy_noise(rng, 3) + .5 * toy_noise(rng, 8) + .6 * toy_noise(rng, 40))
    clouds = np.clip(toy_noise(rng, 36) + .4 * s["lumps"] + rng.random() - .6, 0, 1)[..., None]
    sky = np.array([120, 165, 220]) + (y / hy)[..., None] * np.array([70, 45, 10]) * rng.random()
    s["img"], s["ids"] = sky + clouds * (225 - sky), np.full((2 * H, 2 * W), BACK, np.uint8)

    # The ground, with p the lateral position and z the depth in k = 1 pixels: grass, pavement, kerb, road, lines.
    p, z = (x - vx) * (H - hy) / np.maximum(y - hy, .2), 130 * (H - hy) / np.maximum(y - hy, .2)
    half, edge = 84 + 20 * rng.random(), 140 + 20 * rng.random()
    lines = (abs(p) < 12) & ((z / 130 + rng.random()) % 1 < .75)
    if rng.random() < .6:    # a zebra crossing
        lines |= (abs(z - 150 - 90 * rng.random()) < 30) & ((p + 34) / 44 % 1 < .55) & (abs(p) < 80)
    joints = 1 - .18 * (((z / 30 % 1 < .1) | (p / 25 % 1 < .08)) & (z < 800))
    for mask, cls, rgb, shade in ((p < np.inf, PLANT, (84, 108, 58), 1), (abs(p) < edge, WALK, (152, 144, 134), joints),
                                  (abs(p) < half + 6, WALK, (178, 176, 172), 1), (abs(p) < half, ROAD, (92, 92, 96), 1),
                                  (lines, LINE, (222, 220, 208), 1)):
        toy_paint(s, ..., (y > hy) & mask, cls, rgb, shade * (.8 + .3 * rng.random()))

    # The end of the street, then on either side a back row of houses and a front row of facades, far to near.
    for _ in range(5):
        a, b, c, house = rng.random(4)
        toy_draw(s, vx + 90 * a - 45, hy + 4, 20 + 25 * b, 8 + 18 * c, BUILDING if house < .5 else PLANT,
                 (box(), TOY_TONES[rng.integers(9)] * .6 + 60) if house < .5 else (ell(), (72, 98, 62)))
    front = np.array([FENCE, WALL, (BUILDING, PLANT)[rng.integers(2)], (FENCE, WALL)[rng.integers(2)]])
    looks = {FENCE: ((160, 108, 52), 66), WALL: ((172, 168, 166), 74), PLANT: ((70, 104, 50), 60),
             BUILDING: ((168, 128, 100), 190)}    # colour, height
    cuts = np.array([.07, .33, 1.2]) * (.9 + .2 * rng.random())
    for i, cls in enumerate(front[np.argsort(rng.random(4))]):
        side, far, near, (rgb, h) = (-1, 1)[i // 2], cuts[i % 2], cuts[i % 2 + 1], looks[cls]
        a, b = (.75 + .4 * rng.random((2, 1))) * (.9 + .2 * rng.random((2, 3)))    # tints
        if rng.random() < .7:
            h2 = 150 + 130 * rng.random()
            toy_facade(s, side * (edge + 45), near * .97, far, h2, BUILDING, a * looks[BUILDING][0], rng)
        toy_facade(s, side * edge, near, far, h * (.85 + .3 * rng.random()), cls, b * rgb, rng)

    # The things on the ground: how many of each, in which range of k; drawn far to near.
    kinds = [(CAR, 1, 3, .3, .8), (PERSON, 1, 3, .5, .9), (POLE, 1, 3, .45, .75), (PLANT, 0, 2, .25, .7),
             (OTHER, 0, 1, .4, .8)] + [(ODD, 1, 2, .4, .9)] * anomaly
    todo = []
    for cls, least, most, lo, hi in kinds:
        for _ in range(rng.integers(least, most + 1)):
            k, p = lo + (hi - lo) * rng.random(), (2 * rng.random() - 1) * (half - 15)
            if cls != CAR and (cls != ODD or rng.random() < .5):    # on the pavement, far enough to be in view
                p = (half + (.1 + .8 * rng.random()) * (edge - half)) * (1 if rng.random() < .5 else -1)
                k = min(k, .9 * (W - vx if p > 0 else vx) / abs(p))
            todo.append((k, p, cls))
    for k, p, cls in sorted(todo):
        at = vx + p * k, hy + (H - hy) * k, k, rng
        toy_anomaly(s, *at) if cls == ODD else toy_thing(s, cls, *at)
    ids = s["ids"][::2, ::2].copy()
    if anomaly and np.count_nonzero(ids == ODD) < 40:    # it hides behind something: another scene
        return toy_scene(rng, anomaly)

    # The camera: a mean over 2 x 2 pixels, exposure, a gradient from the sun's side, a colour cast, sensor noise.
    img = (s["img"][::2, ::2] + s["img"][1::2, ::2] + s["img"][::2, 1::2] + s["img"][1::2, 1::2]) / 4
    img *= ((.7 + .5 * rng.random()) * (1 + .15 * sun * (2 * x[::2] / W - 1)))[:, None] * (.93 + .14 * rng.random(3))
    img += 7 * (rng.random(img.shape) + rng.random(img.shape) - 1)
    return np.clip(np.floor(img + .5), 0, 255).astype(np.uint8), ids


def write_toy(root, seed=0, counts=(480, 40, 60)):
    """Write counts = (training, validation, test) scenes under `root`; every scene has its own generator."""
    root = os.path.normpath(root)
    tmp = f"{root}.tmp{os.getpid()}"    # beside it, and renamed when complete: a killed run leaves nothing half-written

    def write(split, i, count):
        town = ("train/{}/training/t1-3", "train/{}/validation/t4", "test/{}/test/t5", "test/{}/test/t6")[
            split + (split == 2 and 3 * i >= 2 * count)]
        scene = toy_scene(np.random.default_rng([seed, split, i]), anomaly=split == 2)
        for kind, a in zip(("images", "annotations"), scene):
            os.makedirs(f"{tmp}/{town.format(kind)}", exist_ok=True)
            Image.fromarray(a).save(f"{tmp}/{town.format(kind)}/{i}.png")

    jobs = [(split, i, count) for split, count in enumerate(counts) for i in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:    # numpy and the PNG encoder release the interpreter lock
        list(pool.map(lambda job: write(*job), jobs))
    if os.path.isdir(root):    # os.replace() moves no folder onto a full one
        os.replace(root, tmp + ".old")
    os.replace(tmp, root)
    shutil.rmtree(tmp + ".old", ignore_errors=True)


def main():
    p = argparse.ArgumentParser(description="Write the toy data: training, validation and test scenes.")
    p.add_argument("folder", help="where to; what stands there is replaced")
    p.add_argument("--seed", type=int, default=0, help="which drawing (default: 0, the toy data of the scripts)")
    p.add_argument("--counts", type=int, nargs=3, default=(480, 40, 60), metavar=("TRAIN", "VAL", "TEST"),
                   help="scenes of each split (default: 480 40 60)")
    args = p.parse_args()
    if args.seed < 0 or min(args.counts) < 1:
        p.error("expected a --seed of at least 0, and --counts of at least 1")
    write_toy(args.folder, args.seed, args.counts)


if __name__ == "__main__":
    main()
