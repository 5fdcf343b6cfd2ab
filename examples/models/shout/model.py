"""Says it louder. The smallest useful Python model: a class `Model` with a method `infer`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Model:
    """`infer` gets arrays by name and returns arrays by name. BYTES are arrays of `bytes`."""

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        text = inputs["TEXT"]
        loud = np.empty(text.shape, dtype=object)
        for at, word in np.ndenumerate(text):
            loud[at] = word.decode().upper()
        return {"TEXT": loud}
