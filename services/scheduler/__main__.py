"""``python -m services.scheduler``."""

from services.scheduler.app import main

if __name__ == "__main__":
    main()
