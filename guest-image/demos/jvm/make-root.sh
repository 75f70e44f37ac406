#!/bin/sh
# The root of the jvm image: a Java runtime of java.base alone with the shared libraries it needs, a static busybox
# as shell, and the demo. No class data archive: its bytes differ from one dump to the next.
set -eu
root=$1
here=$(dirname "$0")
JAVA_HOME=${ORRERY_JDK:-/usr/lib/jvm/java-17-openjdk-amd64}
busybox=$(command -v busybox) || { echo "$0: busybox is missing; apt-get install busybox-static" >&2; exit 1; }
if [ ! -x "$JAVA_HOME/bin/jlink" ]; then
    echo "$0: no JDK 17 in $JAVA_HOME; apt-get install openjdk-17-jdk-headless" >&2
    exit 1
fi
rm -rf "$root"
mkdir -p "$root/bin" "$root/etc" "$root/opt" "$root/app"
"$JAVA_HOME/bin/jlink" --add-modules java.base --strip-java-debug-attributes --no-header-files --no-man-pages \
    --output "$root/opt/java"
ln -s ../opt/java/bin/java "$root/bin/java"
"$JAVA_HOME/bin/javac" -d "$root/app" "$here/Demo.java"
install -m 755 "$here/demo.sh" "$root/app/demo.sh"

# Shared libraries, by asking the dynamic linker; the runtime's own are found through its run path.
find "$root/opt/java" -type f \( -name '*.so' -o -path '*/bin/java' \) -exec ldd {} + |
    sed -n 's/.* => \(\/[^ ]*\) (.*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) (.*/\1/p' | sort -u |
    while read -r library; do
        case $library in
        */opt/java/*) ;;
        *) install -D -m 755 "$(realpath "$library")" "$root$library" ;;
        esac
    done

install -m 755 "$busybox" "$root/bin/busybox"
for applet in sh cat ls ps; do
    ln -s busybox "$root/bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
