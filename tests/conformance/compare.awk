# Compares a suite's results with the table: awk -f compare.awk -v suite=NAME docs/conformance.md RESULTS
# A row of the table is "| suite | tests | result | why |" and may name several tests. Fails on any difference.

FNR == NR {
    if ($0 ~ "^\\| " suite " \\|") {
        split($0, cell, " *\\| *")
        if (cell[4] !~ /^(pass|fail|not run)$/) next
        count = split(cell[3], tests, " ")
        for (i = 1; i <= count; i++) expected[tests[i]] = cell[4]
    }
    next
}

{
    seen[$1] = 1
    total++
    passed += $2 == "pass"
    if (!($1 in expected)) {
        print suite ": " $1 ": " $2 ", and it is not in the table"
        different++
    } else if (expected[$1] != $2) {
        print suite ": " $1 ": " $2 ", and the table says " expected[$1]
        different++
    }
}

END {
    for (test in expected) {
        if (!(test in seen) && expected[test] != "not run") {
            print suite ": " test " did not run, and the table says " expected[test]
            different++
        }
    }
    printf "%s: %d tests, %d passed, %d not as in the table\n", suite, total, passed, different
    exit different > 0
}
