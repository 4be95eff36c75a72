"""``python -m services.motion``."""

from services.motion.app import main

if __name__ == "__main__":
    main()
