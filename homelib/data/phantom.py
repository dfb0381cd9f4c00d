"""Synthetic volumes with exact labels: an abdomen-like CT and an ultrasound-like heart valve, for when no real scan is at hand.

Nothing here is a patient. World coordinates are mm, RAS+ and centred: x grows to the patient's right as nibabel's "R" does, y to
the front, z to the head. Every number below that looks like anatomy is a length in mm or a mean in HU, chosen by eye.
"""

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

Seed = int | np.random.Generator
Volume = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, label, affine

CT_CLASSES = ("background", "bone", "muscle", "liver", "spleen", "kidneys", "stomach", "aorta", "inferior_vena_cava")
US_CLASSES = ("background", "posterior_leaflet", "anterior_leaflet")

# Mean HU by contrast phase; the reasons stand in data_manifests/demo_ct.yaml.
PHASES = {
    "unenhanced": {"liver": 55, "spleen": 45, "kidneys": 32, "stomach": 35, "aorta": 42, "inferior_vena_cava": 38},
    "arterial": {"liver": 72, "spleen": 145, "kidneys": 175, "stomach": 60, "aorta": 330, "inferior_vena_cava": 75},
    "portal venous": {"liver": 112, "spleen": 122, "kidneys": 190, "stomach": 75, "aorta": 155, "inferior_vena_cava": 140},
    "late": {"liver": 90, "spleen": 92, "kidneys": 160, "stomach": 60, "aorta": 105, "inferior_vena_cava": 105},
}


def ct_phantom(seed: Seed, *, shape: tuple[int, int, int] = (96, 96, 96), spacing_mm: float | tuple[float, float, float] = 4.0) -> Volume:
    """A synthetic abdomen-like CT with the eight classes of `demo_ct`; another seed is another "patient" in another contrast phase.

    The patient is drawn smaller where the field of view is below about 350 x 250 x 340 mm, so that every class is there.

    Args:
        seed: an integer, or a generator (which is advanced).
        shape: voxels along x, y, z.
        spacing_mm: voxel size, one number or one per axis.

    Returns:
        image: int16 `shape`, HU with noise, -1024 .. 3071.
        label: uint8 `shape`, class indices of `CT_CLASSES` (not raw labels of the manifest).
        affine: float64 (4, 4), voxel -> world, RAS+.

    Raises:
        ValueError: fewer than 8 voxels along an axis, or a spacing that is not positive.

    >>> image, label, affine = ct_phantom(0, shape=(48, 48, 48), spacing_mm=7.0)
    """
    random = np.random.default_rng(seed)
    x, y, z, affine, scale = _grid_mm(shape, spacing_mm, fits_mm=(350.0, 250.0, 340.0))
    x, y, z = _bent(random, x, y, z)
    hu = np.full(shape, -1000.0, np.float32)
    label = np.zeros(shape, np.uint8)
    means = _phase_draw(random)

    def vary(*values: float, share: float = 0.08) -> np.ndarray:
        return np.asarray(values) * random.uniform(1 - share, 1 + share, len(values))

    def move(*centre: float, by: float = 5.0) -> np.ndarray:
        return np.asarray(centre) + random.uniform(-by, by, 3)

    def paint(mask: np.ndarray, value: float | np.ndarray, name: str | None = None) -> None:
        hu[mask] = value[mask] if isinstance(value, np.ndarray) else value
        label[mask] = CT_CLASSES.index(name) if name else 0

    def organ(name: str, mask: np.ndarray, roughness_hu: float = 8.0) -> None:
        paint(mask, means[name] + roughness_hu * _smooth_noise(random, shape, sigma_voxels=2.0), name)

    # The body from outside in: fat, a wall of muscle (unlabelled, as in the real scans), the cavity with its bowel, the lungs.
    half_width, half_depth = vary(162, 112)
    fat = random.uniform(10, 26)

    def inside(depth: float) -> np.ndarray:
        return (np.abs(x) / (half_width - depth)) ** 2.5 + (np.abs(y) / (half_depth - depth)) ** 2.5 < 1

    under_skin, cavity = inside(fat), inside(fat + 14)
    paint(inside(0), -100 + 8 * _smooth_noise(random, shape, 2.0))
    paint(under_skin, 50.0)
    paint(cavity, -95 + 10 * _smooth_noise(random, shape, 2.0))
    loops = _smooth_noise(random, shape, max(1.0, 9.0 / (min(np.diag(affine)[:3]) / scale)))
    bowel = cavity & (loops > 0.1) & (y > -15) & (z < 35)
    paint(bowel, 28.0)
    paint(bowel & (loops > 1.7), -850.0)
    domes = [np.exp(-((x - side * 78) ** 2 + (y - 5) ** 2) / (2 * 62.0**2)) for side in (1, -1)]
    diaphragm = 62 + random.uniform(-8, 8) + 75 * np.maximum(*domes)
    below = cavity & (z < diaphragm)
    paint(cavity & ~below, -850 + 40 * _smooth_noise(random, shape, 1.0))

    # Organs: liver and vena cava on the right (+x); spleen, stomach and aorta on the left (-x).
    liver = (_ellipsoid(x, y, z, move(72, 8, 78), vary(78, 78, 72)) < 1) | (_ellipsoid(x, y, z, move(5, 48, 92), vary(72, 36, 40)) < 1)
    organ("liver", below & liver)
    bag = _ellipsoid(x, y, z, move(-60, 42, 72), vary(40, 34, 46))
    organ("stomach", below & (bag < 1))
    paint(below & (bag < 0.8) & (y > 58), -820.0, "stomach")  # its gas, in front as the patient lies on the back
    organ("spleen", below & (_ellipsoid(x, y, z, move(-98, -38, 82), vary(28, 40, 46)) < 1), roughness_hu=8 + 0.08 * means["spleen"])
    for side, height in ((1, 0), (-1, 18)):  # the right kidney lies lower, under the liver
        kidney = _ellipsoid(x, y, z, move(side * 60, -42, height), vary(25, 25, 52))
        organ("kidneys", kidney < 1)
        paint(kidney < 0.08, -60.0)  # fat of the renal sinus, no kidney
        paint(_ellipsoid(x, y, z, move(side * 34, -92, 0, by=3), vary(28, 19, 1e4)) < 1, 52.0, "muscle")  # back muscle
        thickness = np.clip(6 + (70 - z) * 0.11, 6, 24)
        paint(((x - side * (36 + 0.12 * (60 - z))) ** 2 + (y + 52) ** 2 < thickness**2) & (z < 85), 56.0, "muscle")  # iliopsoas
        paint(under_skin & (_ellipsoid(x, y, z, move(side * 88, -78, -135), vary(58, 32, 62)) < 1), 48.0, "muscle")  # gluteus
    sway = random.uniform(-5, 5)
    vein = ((x - 20 - 0.4 * sway) / 12) ** 2 + ((y + 28) / 9.5) ** 2 < 1
    organ("inferior_vena_cava", vein & (z > -80) & (z < diaphragm + 8))
    artery = ((x + 12 + sway * np.sin(z / 60)) ** 2 + (y + 26) ** 2 < random.uniform(9, 12) ** 2) & (z > -75)
    organ("aorta", artery)

    # Bone last: a hard shell around a softer inside; discs and the canal are background.
    level = np.mod(z + random.uniform(0, 36), 36)
    body = ((x / 23) ** 2 + ((y + 58) / 18) ** 2) + 0 * z
    arch = ((x / 20) ** 2 + ((y + 86) / 14) ** 2) + 0 * z
    column = z > -112
    paint(column & (body < 1), 75.0)  # discs
    paint(column & (body < 1) & (level > 8), np.where(body > 0.75, 420.0, 190.0).astype(np.float32), "bone")
    paint(column & (arch < 1), 330.0, "bone")
    paint(column & ((np.abs(x) < 4) & (y < -88) & (y > -112) & (level > 14)), 300.0, "bone")  # spinous process
    paint(column & (((x / 9) ** 2 + ((y + 85) / 8) ** 2) < 1), 25.0)  # canal
    stripes = np.mod(z + 0.45 * y + random.uniform(0, 34), 34) < 12
    paint(inside(fat + 1) & ~inside(fat + 10) & stripes & (z > 25) & ((np.abs(x) > 55) | (y < 0)) & (np.abs(x) > 26), 320.0, "bone")  # ribs
    for side in (1, -1):
        wing = _ellipsoid(x, y, z, (side * 78, -30, -128), vary(48, 58, 62))
        paint(under_skin & (wing < 1) & (wing > 0.72) & (side * x > 62), 340.0, "bone")
        paint(under_skin & (_ellipsoid(x, y, z, (side * 92, -8, -172), (24, 24, 26)) < 1), 280.0, "bone")  # femoral head
    paint(under_skin & (_ellipsoid(x, y, z, (0, -72, -132), vary(42, 20, 40)) < 1), 200.0, "bone")  # sacrum

    noise_hu = random.uniform(8, 18)
    image = gaussian_filter(hu, 0.45) + noise_hu * _smooth_noise(random, shape, 0.6)
    return np.clip(np.round(image), -1024, 3071).astype(np.int16), label, affine


def us_phantom(seed: Seed, *, shape: tuple[int, int, int] = (96, 96, 96), spacing_mm: float | tuple[float, float, float] = 1.0, shadow: bool = True) -> Volume:
    """A synthetic 3D ultrasound-like view of a closed valve with two thin leaflets; another seed is another "patient".

    The beams leave one point at the top (largest z). Along each beam: reflectivity x Rayleigh speckle (correlated along the beam)
    x attenuation with depth; a bright nodule on the annulus swallows the beam and leaves a shadow. Then logarithmic compression
    (50 dB) and scan conversion to voxels. No wave is simulated. The scene shrinks where the field of view is below 90 mm.

    Args:
        seed: an integer, or a generator (which is advanced).
        shape: voxels along x, y, z.
        spacing_mm: voxel size, one number or one per axis. Leaflets are 2.4 mm thick, or 1.5 voxels where that is more.
        shadow: False leaves the same scene without the nodule's absorption.

    Returns:
        image: float32 `shape`, 0 .. 255; exactly 0 outside the fan.
        label: uint8 `shape`, class indices of `US_CLASSES`.
        affine: float64 (4, 4), voxel -> world, RAS+.
    """
    random = np.random.default_rng(seed)
    x, y, z, affine, scale = _grid_mm(shape, spacing_mm, fits_mm=(90.0, 90.0, 90.0))
    depth_mm, half_angle = 92.0, np.deg2rad(random.uniform(36, 42))
    apex_z = 45.0
    valve = _Valve(random, thickness_mm=max(2.4, 1.5 * float(np.diag(affine)[:3].max()) / scale))

    # The scene in beam coordinates: distance r from the apex, and the angles of x and y against the axis.
    r = np.linspace(1.0, depth_mm, 144, dtype=np.float32)
    angle = np.linspace(-half_angle, half_angle, 80, dtype=np.float32)
    r_, a_, b_ = np.meshgrid(r, angle, angle, indexing="ij")
    down = r_ / np.sqrt(1 + np.tan(a_) ** 2 + np.tan(b_) ** 2)
    reflectivity, absorption = valve.tissue(down * np.tan(a_), down * np.tan(b_), apex_z - down, shadow)
    real, imaginary = (gaussian_filter(random.standard_normal(r_.shape, dtype=np.float32), (2.5, 0.6, 0.6)) for _ in range(2))
    speckle = np.hypot(real, imaginary)  # the length of a complex normal number: Rayleigh
    speckle /= speckle.mean()
    step = float(r[1] - r[0])
    attenuation = np.exp(-2 * step * np.cumsum(absorption, axis=0))  # there and back
    decibel = 20 * np.log10(reflectivity * speckle * attenuation + 1e-6)
    grey = np.clip((decibel + 46) / 50, 0, 1) * 255

    # Scan conversion: where each voxel lies in beam coordinates.
    voxel_down = apex_z - z
    distance = np.sqrt(x**2 + y**2 + voxel_down**2)
    a, b = np.arctan2(x, voxel_down), np.arctan2(y, voxel_down)
    fan = (voxel_down > 0) & (distance >= r[0]) & (distance <= depth_mm) & (np.abs(a) <= half_angle) & (np.abs(b) <= half_angle)
    place = [(distance - r[0]) / step, (a + half_angle) / (angle[1] - angle[0]), (b + half_angle) / (angle[1] - angle[0])]
    image = np.zeros(shape, np.float32)
    image[fan] = map_coordinates(grey, [axis[fan] for axis in place], order=1, mode="nearest")
    return image, np.where(fan, valve.label(x, y, z), 0).astype(np.uint8), affine


class _Valve:
    """A closed two-leaflet valve between two blood-filled chambers: what lies at a point (mm)."""

    def __init__(self, random: np.random.Generator, thickness_mm: float):
        self.centre = np.array([0.0, 0.0, -3.0]) + random.uniform(-3, 3, 3)
        self.tilt = random.uniform(-0.2, 0.2, 2)
        self.radius_p, self.radius_q = random.uniform(19, 22), random.uniform(15, 18)
        self.tent, self.crease = random.uniform(4, 8), random.uniform(2, 4)
        self.line, self.bow = random.uniform(-0.2, 0.0), random.uniform(0.2, 0.45)
        self.thickness = thickness_mm
        corner = random.uniform(0, 2 * np.pi)
        self.nodule = (self.radius_p * np.cos(corner), self.radius_q * np.sin(corner), 0.0, random.uniform(3.0, 4.5))

    def _local(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(p, q) in the plane of the annulus, w above it, rho = 1 on it."""
        p, q = x - self.centre[0], y - self.centre[1]
        w = z - self.centre[2] - self.tilt[0] * p - self.tilt[1] * q
        return p, q, w, np.sqrt((p / self.radius_p) ** 2 + (q / self.radius_q) ** 2)

    def label(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """0 none, 1 posterior leaflet, 2 anterior leaflet (the larger one)."""
        p, q, w, rho = self._local(x, y, z)
        coaptation = self.radius_q * (self.line - self.bow * (1 - (p / self.radius_p) ** 2) + self.bow / 2)
        sheet = -self.tent * (1 - rho**2) - self.crease * np.exp(-(((q - coaptation) / 4) ** 2)) * (rho < 1)
        leaflet = (rho <= 1) & (np.abs(w - sheet) < self.thickness / 2)
        return np.where(leaflet, np.where(q < coaptation, 1, 2), 0).astype(np.uint8)

    def tissue(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, shadow: bool) -> tuple[np.ndarray, np.ndarray]:
        """Reflectivity (1 is bright tissue) and absorption (per mm)."""
        p, q, w, rho = self._local(x, y, z)
        blood = (_ellipsoid(p, q, w, (0, 0, 21), (27, 25, 25)) < 1) | (_ellipsoid(p, q, w, (0, 0, -30), (24, 23, 34)) < 1) | ((rho < 1) & (np.abs(w) < 9))
        reflectivity = np.where(blood, 0.008, 0.35).astype(np.float32)
        ring = ((rho - 1) * self.radius_q) ** 2 + w**2 < 3.0**2
        reflectivity[ring] = 0.7
        reflectivity[self.label(x, y, z) > 0] = 0.8
        absorption = np.where(blood, 0.001, 0.008).astype(np.float32)
        p0, q0, w0, radius = self.nodule
        nodule = (p - p0) ** 2 + (q - q0) ** 2 + (w - w0) ** 2 < radius**2
        reflectivity[nodule] = 2.0
        if shadow:
            absorption[nodule] = 0.3
        return reflectivity, absorption


def _grid_mm(
    shape: tuple[int, ...], spacing_mm: float | tuple[float, float, float], fits_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Dense x, y, z (float32, scene millimetres), the RAS+ affine (true millimetres), and true / scene millimetres."""
    shape = tuple(int(n) for n in shape)
    spacing = np.broadcast_to(np.asarray(spacing_mm, np.float64), (3,))
    if len(shape) != 3 or min(shape) < 8 or spacing.min() <= 0:
        raise ValueError(f"shape {shape} and spacing_mm {spacing_mm}: three sizes of at least 8 voxels and a positive spacing are expected")
    scale = min(1.0, *(n * s / fits for n, s, fits in zip(shape, spacing, fits_mm, strict=True)))
    axes = [((np.arange(n) - (n - 1) / 2) * s / scale).astype(np.float32) for n, s in zip(shape, spacing, strict=True)]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.asarray(shape) - 1) / 2 * spacing
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x, y, z, affine, scale


def _bent(random: np.random.Generator, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same points seen through a gentle wave, so that no organ is an exact ellipsoid, and a small shift of the whole patient."""
    phase = random.uniform(0, 2 * np.pi, 3)
    shift = random.uniform(-7, 7, 3)
    return (
        x + 4 * np.sin(z / 38 + phase[0]) + shift[0],
        y + 3 * np.sin(x / 32 + phase[1]) + shift[1],
        z + 5 * np.sin(x / 45 + phase[2]) + shift[2],
    )


def _phase_draw(random: np.random.Generator) -> dict[str, float]:
    """Mean HU of each enhancing class: one contrast phase, each class off its mean by up to 8 %; sometimes positive oral contrast."""
    phase = PHASES[list(PHASES)[random.integers(len(PHASES))]]
    means = {name: hu * random.uniform(0.92, 1.08) for name, hu in phase.items()}
    means["stomach"] += random.uniform(80, 200) if random.random() < 0.25 else 0.0
    return means


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, centre: Iterable[float], radii: Iterable[float]) -> np.ndarray:
    """Squared distance from the centre in radii: below 1 inside."""
    along_x, along_y, along_z = (((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radii, strict=True))
    return along_x + along_y + along_z


def _smooth_noise(random: np.random.Generator, shape: tuple[int, ...], sigma_voxels: float) -> np.ndarray:
    """Gaussian noise of unit variance, smooth over about `sigma_voxels`."""
    noise = gaussian_filter(random.standard_normal(shape, dtype=np.float32), sigma_voxels, mode="wrap")
    return noise / noise.std()
