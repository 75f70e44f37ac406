//! Dates of the proleptic Gregorian calendar, from and to seconds since 1970.

const DAY: i64 = 86_400;
/// The last second of the year 9999: four digits are all the clock has.
pub const LAST_SECOND: i64 = 253_402_300_799;

/// A point in time, as a clock face shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 1 is Sunday.
    pub day_of_week: u8,
}

impl DateTime {
    /// Seconds outside the years 0 to 9999 show as the nearest second inside.
    pub fn from_unix(seconds: i64) -> DateTime {
        let seconds = seconds.clamp(days_from_civil(0, 1, 1) * DAY, LAST_SECOND);
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = civil_from_days(days);
        DateTime {
            year,
            month,
            day,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            // 1970-01-01 was a Thursday.
            day_of_week: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Fields out of range carry over; the day of the week is not looked at.
    pub fn to_unix(self) -> i64 {
        let month = i64::from(self.month) - 1;
        let (year, month) = (self.year + month.div_euclid(12), month.rem_euclid(12) + 1);
        let days = days_from_civil(year, month, 1) + i64::from(self.day) - 1;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// Days since 1970-01-01. Years start in March here, so that the leap day is a year's last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (century4, year_of) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    century4 * 146_097 + year_of * 365 + year_of / 4 - year_of / 100 + day_of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, u8, u8) {
    let days = days + 719_468;
    let (century4, day_of) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of = (day_of - day_of / 1_460 + day_of / 36_524 - day_of / 146_096) / 365;
    let day_of_year = day_of - (365 * year_of + year_of / 4 - year_of / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = century4 * 400 + year_of + i64::from(month <= 2);
    (year, month as u8, day as u8)
}

/// Seconds from `start` to the first second, `start` included, whose (second, minute, hour) are as wanted; None
/// wants any. None if no second of a day is so.
pub fn seconds_until(start: i64, wanted: [Option<u8>; 3]) -> Option<u64> {
    let [second, minute, hour] = wanted;
    if second.is_some_and(|s| s > 59) || minute.is_some_and(|m| m > 59) || hour.is_some_and(|h| h > 23) {
        return None;
    }
    let differs = |wanted: Option<u8>, value: i64| wanted.is_some_and(|wanted| i64::from(wanted) != value);
    let of_day = start.rem_euclid(DAY);
    let mut at = of_day;
    // Each step goes to the start of the next hour, minute or second: at most 25 + 60 + 60 steps.
    loop {
        let within = at.rem_euclid(DAY);
        if differs(hour, within / 3600) {
            at += 3600 - within % 3600;
        } else if differs(minute, within / 60 % 60) {
            at += 60 - within % 60;
        } else if differs(second, within % 60) {
            at += 1;
        } else {
            return Some((at - of_day) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        let date = DateTime::from_unix(1_767_225_600);
        assert_eq!((date.year, date.month, date.day, date.hour, date.day_of_week), (2026, 1, 1, 0, 5));
        let leap = DateTime::from_unix(951_782_400);
        assert_eq!((leap.year, leap.month, leap.day), (2000, 2, 29));
        assert_eq!(DateTime::from_unix(i64::MAX).year, 9999);
        assert_eq!(DateTime::from_unix(i64::MIN).year, 0);
    }

    proptest! {
        #[test]
        fn conversion_round_trips(seconds in -62_000_000_000i64..=LAST_SECOND) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }

        #[test]
        fn the_next_match_is_the_first(start in 0..200_000i64, s in proptest::option::of(0..60u8),
                                       m in proptest::option::of(0..60u8), h in proptest::option::of(0..24u8)) {
            let matches = |at: i64| {
                let date = DateTime::from_unix(at);
                s.is_none_or(|s| s == date.second) && m.is_none_or(|m| m == date.minute) && h.is_none_or(|h| h == date.hour)
            };
            let slow = (start..).find(|at| matches(*at)).unwrap();
            prop_assert_eq!(seconds_until(start, [s, m, h]), Some((slow - start) as u64));
        }
    }
}
