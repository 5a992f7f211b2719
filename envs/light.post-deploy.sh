# Run by Snakemake in the folder of the workflow, once the environment has been made.
python -m pip install --no-deps --editable .
