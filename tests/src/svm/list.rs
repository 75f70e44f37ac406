//! Which programs run in the machine: a list in a file, `tests/svm/list`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Variables of the environment that reach the programs: those that begin so.
const PASSED_ON: [&str; 3] = ["KVM_ORACLE_", "ORACLE_", "ORRERY_"];

/// A test of this workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Cargo's package.
    pub package: String,
    /// Its test target, or `lib` for the unit tests of the library.
    pub target: String,
    /// Arguments.
    pub arguments: Vec<String>,
    /// Words that the output must contain: that nothing was skipped.
    pub expected: Option<String>,
}

impl Entry {
    /// A name for files and messages.
    pub fn name(&self) -> String {
        format!("{}-{}", self.package, self.target)
    }

    /// Builds the test and says where it is.
    pub fn build(&self) -> Result<PathBuf> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["test", "--release", "--locked", "--no-run", "--message-format=json-render-diagnostics"]);
        cargo.args(["--package", &self.package]);
        match self.target.as_str() {
            "lib" => cargo.arg("--lib"),
            name => cargo.args(["--test", name]),
        };
        let output = cargo.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
        ensure!(output.status.success(), "the test {} of {} does not build", self.target, self.package);
        executable(&String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("cargo built no executable for {} of {}", self.target, self.package))
    }
}

/// The test's executable, from cargo's messages.
fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
}

/// Reads a list: a test a line, `PACKAGE TARGET [ARGUMENT...] [| WORDS]`; `#` begins a comment.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("in {}", path.display()))
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let (call, expected) = match line.split_once('|') {
            Some((call, words)) => (call, Some(words.trim().to_owned())),
            None => (line, None),
        };
        let words: Vec<String> = call.split_whitespace().map(str::to_owned).collect();
        match &words[..] {
            [] if expected.is_none() => {}
            [package, target, arguments @ ..] => entries.push(Entry {
                package: package.clone(),
                target: target.clone(),
                arguments: arguments.to_vec(),
                expected,
            }),
            _ => bail!("line {}: expected PACKAGE TARGET [ARGUMENT...] [| WORDS]", number + 1),
        }
    }
    ensure!(!entries.is_empty(), "it names no test");
    Ok(entries)
}

/// What of this process's environment is passed on, in a fixed order.
pub fn environment() -> Vec<(String, String)> {
    let mut passed: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| PASSED_ON.iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    passed.sort();
    passed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let entries = parse("# tests\norrery-cpu kvm --x y | 0 differences # all\n\n orrery-vmm lib\n").unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].name(), "orrery-cpu-kvm");
        assert_eq!(entries[0].arguments, ["--x", "y"]);
        assert_eq!(entries[0].expected.as_deref(), Some("0 differences"));
        assert_eq!((entries[1].target.as_str(), &entries[1].expected), ("lib", &None));
    }

    #[test]
    fn lists_that_say_nothing_are_refused() {
        for text in ["", "# nothing\n", "orrery-cpu\n", "| words\n"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_list_of_this_workspace_is_in_order() {
        let entries = read(&crate::workshop::workspace().join("tests/svm/list")).unwrap();
        assert!(entries.iter().any(|entry| entry.package == "orrery-cpu" && entry.target == "kvm"));
    }

    #[test]
    fn executables_are_found_among_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","profile":{"test":false},"executable":"/t/orrery"}"#,
            "\nnot JSON\n",
            r#"{"reason":"compiler-artifact","profile":{"test":true},"executable":"/t/kvm-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages), Some(PathBuf::from("/t/kvm-1")));
        assert_eq!(executable(""), None);
    }
}
