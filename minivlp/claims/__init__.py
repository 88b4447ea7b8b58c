"""The claims of the papers behind this course, tested again in miniature: `python -m minivlp claims`.

    settings      every size of every experiment, once for --quick and once for the full command
    world         eight objects in small pictures: training rows and test items for questions of binding
    pairs, exam   one archetype trained in that world, and asked
    naming, grounding, layers, clock, chunks    the other experiments of the first half of the course
    small         a few objects in smaller pictures, for trainings of less than a minute and more seeds
    writing, codes    the experiments there: captioners, pictures as words
    claim, table  what is said, by whom, how it is tested here, which number decides
    verdict       from numbers to "holds here", "does not" or "cannot be told at this size"
    work          one experiment and one seed at a time; what is done is not done again
    report, pictures                            claims.md and a picture a claim

Left out: claims that need photographs, or more than a laptop.
"""
