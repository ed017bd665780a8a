"""``python -m glm4ft`` is ``glm4ft``."""

from glm4ft.cli.main import main

main()
