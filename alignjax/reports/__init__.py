"""Reports: the HTML page of runs, and studies that compare runs over several seeds."""
