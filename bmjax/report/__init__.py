"""The page that a person looks at, and the same figures as a table in the terminal and in Markdown."""

from bmjax.report.page import write as write
from bmjax.report.sensitivity import write_sensitivity as write_sensitivity
from bmjax.report.table import markdown as markdown
from bmjax.report.table import table as table
