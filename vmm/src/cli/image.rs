//! `orrery image`.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_guest_image::{BuildError, BuildOptions, Description, build};

use super::args::{ImageArgs, ImageBuildArgs, ImageCommand, ImageExtractArgs, ImageInspectArgs};
use super::exit::{self, Failure};
use super::run::open_image;
use super::say;

pub(super) fn image(arguments: ImageArgs) -> Result<u8, Failure> {
    match arguments.command {
        ImageCommand::Build(arguments) => build_image(*arguments),
        ImageCommand::Inspect(arguments) => inspect(arguments),
        ImageCommand::Extract(arguments) => extract(arguments),
    }
}

fn build_image(arguments: ImageBuildArgs) -> Result<u8, Failure> {
    let options = BuildOptions {
        kernel: arguments.kernel,
        modules: arguments.modules,
        root: arguments.root,
        entry: arguments.entry.into_iter().chain(arguments.command).collect(),
        environment: arguments.env,
        working_directory: arguments.directory,
        host_name: arguments.hostname,
        command_line: arguments.cmdline.unwrap_or_default(),
        disk_size_mib: arguments.disk_size,
    };
    let bar = if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is constant");
        ProgressBar::new_spinner().with_style(style)
    } else {
        ProgressBar::hidden()
    };
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    let built = build(&options, |step| bar.set_message(step.describe()));
    bar.finish_and_clear();
    let image = built.map_err(build_failure)?;
    image.write(&arguments.output).map_err(|e| Failure::new(exit::IMAGE, e))?;
    if arguments.json {
        print(&image.describe(), true);
    } else {
        say(format_args!("{} {}", arguments.output.display(), orrery_guest_image::image::hex(&image.hash())));
    }
    Ok(0)
}

/// A wrong option is the user's; everything else is the image's.
fn build_failure(error: BuildError) -> Failure {
    let code = match error {
        BuildError::Option { .. } => exit::USAGE,
        BuildError::ToolMissing { .. } => exit::HOST,
        _ => exit::IMAGE,
    };
    Failure::new(code, error)
}

fn inspect(arguments: ImageInspectArgs) -> Result<u8, Failure> {
    print(&open_image(&arguments.image)?.describe(), arguments.json);
    Ok(0)
}

fn extract(arguments: ImageExtractArgs) -> Result<u8, Failure> {
    let image = open_image(&arguments.image)?;
    let paths = image.extract(&arguments.directory).map_err(|e| Failure::new(exit::IMAGE, e))?;
    paths.iter().for_each(|path| say(path.display()));
    Ok(0)
}

fn print(description: &Description, json: bool) {
    if json {
        say(serde_json::to_string(description).expect("a description is plain data"));
        return;
    }
    say(format_args!("image         {}", description.hash));
    say(format_args!("format        {}", description.format));
    say(format_args!("kernel        {}", description.kernel_kind));
    if let Some(release) = &description.metadata.kernel_release {
        say(format_args!("release       {release}"));
    }
    if let Some(package) = &description.metadata.kernel_package {
        say(format_args!("package       {package}"));
    }
    say(format_args!("command line  {}", description.command_line));
    say(format_args!("entry         {}", description.entry.join(" ")));
    for variable in &description.environment {
        say(format_args!("environment   {variable}"));
    }
    if !description.metadata.modules.is_empty() {
        say(format_args!("modules       {}", description.metadata.modules.join(" ")));
    }
    for section in &description.sections {
        say(format_args!("section       {:<14} {:>12} bytes  {}", section.name, section.bytes, section.hash));
    }
}
