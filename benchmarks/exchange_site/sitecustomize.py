"""Python runs this in every process that has the folder in its PYTHONPATH: they all find the method
`echo` beside it.
"""

from pathlib import Path

import fedspine.methods

fedspine.methods.__path__.append(str(Path(__file__).parent / "methods"))
