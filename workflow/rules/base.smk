def model_files(w):
    "The files of a local model folder; a model on the hub has none here."
    folder = CONFIG.model.path
    if not os.path.isdir(folder):
        return []
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith((".safetensors", ".json")))


def base_users(w):
    "Base users' histories and queries; written by `split` without being declared."
    return os.path.join(os.path.dirname(checkpoints.split.get(task=w.task).output.users), "base.jsonl")


rule base_recipe:
    output:
        BASE + "/recipe.json",
    params:
        recipe=lambda w: as_json(recipe.base_recipe(CONFIG, w.task, w.augmentation)),
    log:
        LOGS + "/{task}/{augmentation}/base_recipe.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# The adapter beside base.json is not declared: Snakemake deletes what is declared, before a job and when it fails.
rule base:
    input:
        users=base_users,
        recipe=BASE + "/recipe.json",
        model=model_files,
    output:
        BASE + "/base.json",
    params:
        mended=lambda w: mended(BASE.format(**w) + "/base.json"),
    log:
        LOGS + "/{task}/{augmentation}/base.log",
    benchmark:
        BENCHMARKS + "/{task}/{augmentation}/base.tsv"
    resources:
        mem_mb=4000,
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu base {output:q} --recipe {input.recipe:q} --base-users {input.users:q} --mended {params.mended:q}"
        " > {log:q} 2>&1"
