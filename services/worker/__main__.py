"""``python -m services.worker``."""

from shared.reproducible import make_products_reproducible


def run() -> None:
    """Choose how products are summed, then load torch with the rest of the worker, and run."""
    make_products_reproducible()
    from services.worker.app import main

    main()


if __name__ == "__main__":
    run()
