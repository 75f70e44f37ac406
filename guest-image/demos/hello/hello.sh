#!/bin/sh
# Shows what the guest sees of its machine, and what chance gives it.
echo "hello from $(uname -srm)"
echo "date: $(date -u)"
echo "uptime: $(cat /proc/uptime)"
grep -m 1 'model name' /proc/cpuinfo
grep -m 1 '^flags' /proc/cpuinfo
echo "memory: $(grep MemTotal /proc/meminfo)"
echo "clock source: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "16 random bytes: $(head -c 16 /dev/urandom | od -An -tx1)"
echo "boot id: $(cat /proc/sys/kernel/random/boot_id)"
echo "processes:"
ps
exit 0
