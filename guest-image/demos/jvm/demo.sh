#!/bin/sh
# The same program under two garbage collectors, with their logs.
set -e
options="-Xmx128m -Xshare:auto -XX:ActiveProcessorCount=4 -Xlog:gc -cp /app"
echo "== serial collector"
java -XX:+UseSerialGC $options Demo
echo "== G1 collector"
java -XX:+UseG1GC $options Demo
