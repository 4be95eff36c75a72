"""``python -m services.egress``."""

from services.egress.app import main

if __name__ == "__main__":
    main()
