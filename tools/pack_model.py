"""Pack a video model's weights into eight bits, as they ship: `python tools/pack_model.py MODEL OUT`."""

import argparse
import shutil
from pathlib import Path

from geodiff4d.core.files import fresh_folder, load_model, save_model
from geodiff4d.core.packing import packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with fresh_folder(args.out) as folder:
        for part in sorted(p for p in args.model.iterdir() if p.is_dir()):
            if part.name == "vae":  # Small, and every picture passes through it.
                shutil.copytree(part, folder / part.name)
            else:
                config, state = load_model(part)
                save_model(folder / part.name, config, packed(state))
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
