# Pre-trains the tiny Llama anew (half an hour on two cores). The shipped one, in data/models/oppu-tiny, is not touched:
# set model.path to this folder to use it.
rule tiny_lm:
    input:
        corpus="data/corpus.jsonl.gz",
        sample="data/sample",
    output:
        directory(f"{RESULTS}/oppu-tiny"),
    log:
        f"{LOGS}/tiny_lm.log",
    benchmark:
        f"{BENCHMARKS}/tiny_lm.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 2
    resources:
        mem_mb=6000,
    shell:
        "oppu tiny-lm {input.corpus:q} {input.sample:q} {output:q} > {log:q} 2>&1"
