"""What the next round learns from in a mask's place: a probability on which several looks agree."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from onelabel.configs.streams import PseudoLabelConfig
from onelabel.imaging import volume
from onelabel.imaging.classes import Classes
from onelabel.imaging.labels import LEVELS
from onelabel.imaging.volume import Volume
from onelabel.models.predictor import Prediction, classes_of, clean, likeliest
from onelabel.models.rankers.autoencoder import AutoencoderRanker
from onelabel.models.rankers.base import Predict
from onelabel.models.rankers.views import sample_views, seen_by


class PseudoLabeller:
    """The mean over networks and views, or what a mask autoencoder makes of it.

    predict : the present network, which made the predictions; earlier : networks of earlier rounds, on the same grid
    autoencoder : if masks are to be projected
    classes : of the networks; None: one structure
    """

    def __init__(
        self,
        config: PseudoLabelConfig,
        predict: Predict,
        /,
        *,
        earlier: Sequence[Predict] = (),
        autoencoder: AutoencoderRanker | None = None,
        classes: Classes | None = None,
    ) -> None:
        self.predict, self.earlier, self.autoencoder, self.classes = predict, earlier, autoencoder, classes
        self.views = sample_views(config.views) if config.views else []

    def __call__(self, prediction: Prediction, /) -> Volume:
        """The probability of each structure on the scan's own grid, uint8: 255 for 1.

        (*native) of one structure, (*native, structures) of several. As in masks only the largest components of what is
        likeliest are kept and holes are filled: 0 in what is lost, 1 in what is filled.
        """
        mask = prediction.mask
        on_grid = self.on_grid(prediction).cpu().numpy()
        native = volume.restore(on_grid, prediction.affine, mask.shape, mask.affine).clip(0, 1)
        found = classes_of(native)
        kept = clean(found, self.classes)
        changed = kept != found
        native[:, changed] = kept[changed] == np.arange(1, len(native) + 1)[:, None]
        levels = np.ceil(native * (LEVELS - 1) - 0.5).astype(np.uint8)  # one half, where networks differ, is not it
        return Volume(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1), mask.affine)

    @torch.inference_mode()
    def on_grid(self, prediction: Prediction, /) -> Tensor:
        """The probability of each structure (structures, *size) float32 on the network's grid."""
        total, passes = torch.zeros_like(prediction.probability), 0
        for probability in self._passes(prediction):
            total += probability
            passes += 1
        if self.autoencoder:
            return self.autoencoder.reconstruct(likeliest(total)[0])
        return total[0, 1:] / passes

    def _passes(self, prediction: Prediction) -> Iterator[Tensor]:
        """Class probabilities, as many of each network."""
        yield prediction.probability
        yield from seen_by(self.predict, prediction.image, self.views, own=prediction.probability)
        for predict in self.earlier:
            yield (own := predict(prediction.image))
            yield from seen_by(predict, prediction.image, self.views, own=own)
