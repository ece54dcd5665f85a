//! The command line's definition.

use clap::CommandFactory as _;

use super::*;

#[test]
fn the_definition_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn every_command_shows_examples() {
    fn every(command: &clap::Command) {
        if command.has_subcommands() {
            command.get_subcommands().for_each(every);
        } else {
            let help = command.get_after_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|text| text.starts_with("Examples:\n  ")),
                "{}",
                command.get_name()
            );
        }
    }
    Arguments::command().get_subcommands().for_each(every);
}

#[test]
fn labels_need_a_key() {
    assert_eq!(label("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
    assert_eq!(label("a="), Ok(("a".to_owned(), String::new())));
    for bad in ["", "a", "=b"] {
        assert!(label(bad).is_err(), "{bad:?}");
    }
}
