"""The report of a run: one page that needs neither network nor server, renewed while the run goes on."""
