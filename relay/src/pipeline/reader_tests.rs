// SPDX-License-Identifier: PostgreSQL

use super::*;

fn mark(text: &str) -> Arc<Mark> {
    Mark::parse("a test", text.into()).unwrap()
}

fn at(position: &str) -> StoredCursor {
    StoredCursor { position: mark(position), target: None, acked: 0 }
}

fn texts(piece: Option<(Arc<Mark>, Arc<Mark>, i64)>) -> Option<(String, String, i64)> {
    piece.map(|(from, to, after)| (from.text().to_owned(), to.text().to_owned(), after))
}

fn piece(from: &str, to: &str, after: i64) -> Option<(String, String, i64)> {
    Some((from.into(), to.into(), after))
}

#[test]
fn it_waits_for_a_head_that_is_past_its_position() {
    let (mut reader, mut progress) = Reader::new(at("1|10|10|20:20:|"), [1].into()).unwrap();
    assert!(reader.next(None, &mut progress).is_none());
    for not_past in ["1|10|10|20:20:|", "1|9|9|19:19:|", "1|10|10|20:22:20,21|", "2|99|99|99:99:|"] {
        let head = mark(not_past);
        let is_same_snapshot = not_past.contains("20:22");
        let found = reader.next(Some(&head), &mut progress).is_some();
        assert_eq!(found, is_same_snapshot, "{not_past}");
        if found {
            // Nothing new is visible there, but it was read later: the window is empty.
            reader.read(10, true);
            progress.scanned(10, true);
            (reader, progress) = Reader::new(at("1|10|10|20:20:|"), [1].into()).unwrap();
        }
    }
    let head = mark("1|12|12|23:23:|");
    assert_eq!(
        texts(reader.next(Some(&head), &mut progress)),
        piece("1|10|10|20:20:|", "1|12|12|23:23:|", 0)
    );
}

#[test]
fn a_head_that_does_not_see_what_the_position_sees_is_older() {
    let (mut reader, mut progress) = Reader::new(at("1|10|10|22:22:|"), [1].into()).unwrap();
    let older = mark("1|10|10|20:22:20|");
    assert!(reader.next(Some(&older), &mut progress).is_none());
}

#[test]
fn windows_follow_one_another_page_by_page() {
    let (mut reader, mut progress) = Reader::new(at("1|0|0|3:3:|"), [1].into()).unwrap();
    let (first, second) = (mark("1|5|5|9:9:|"), mark("1|8|8|12:12:|"));
    assert_eq!(texts(reader.next(Some(&first), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 0));
    reader.read(3, false);
    assert_eq!(texts(reader.next(Some(&second), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 3));
    reader.read(5, true);
    assert_eq!(texts(reader.next(Some(&second), &mut progress)), piece("1|5|5|9:9:|", "1|8|8|12:12:|", 0));
    reader.read(8, true);
    assert!(reader.next(Some(&second), &mut progress).is_none());
}

#[test]
fn a_window_that_was_left_is_read_to_its_end_first() {
    let cursor = StoredCursor { target: Some(mark("1|5|5|9:9:|")), acked: 4, ..at("1|0|0|3:3:|") };
    let (mut reader, mut progress) = Reader::new(cursor, [1].into()).unwrap();
    assert_eq!(progress.frontier().acked, 4);
    let head = mark("1|8|8|12:12:|");
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece("1|0|0|3:3:|", "1|5|5|9:9:|", 4));
}

#[test]
fn older_eras_are_drained_first() {
    let (mut reader, mut progress) = Reader::new(at("7|5|5|9:9:|"), [7, 8, 9].into()).unwrap();
    let head = mark("9|8|8|12:12:|");
    let end = |era| Position::end_of_era(era).to_string();
    let start = |era| Position::start_of_era(era).to_string();
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece("7|5|5|9:9:|", &end(7), 0));
    reader.read(6, true);
    progress.scanned(6, true);
    assert_eq!(progress.frontier().position.text(), start(8));
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece(&start(8), &end(8), 0));
    reader.read(6, true);
    assert_eq!(texts(reader.next(Some(&head), &mut progress)), piece(&start(9), "9|8|8|12:12:|", 0));
}

#[test]
fn a_cursor_in_the_end_of_an_era_goes_on_in_the_next() {
    let end = Position::end_of_era(7).to_string();
    let cursor = StoredCursor { target: Some(mark(&end)), acked: 4, ..at("7|1|1|3:3:|") };
    let (mut reader, mut progress) = Reader::new(cursor, [7, 8].into()).unwrap();
    assert_eq!(texts(reader.next(None, &mut progress)), piece("7|1|1|3:3:|", &end, 4));
    reader.read(6, true);
    assert_eq!(reader.position.era(), 8);
    assert_eq!(Reader::new(at(&end), [7, 8].into()).map(|(reader, _)| reader.position.era()), Ok(8));
    assert!(Reader::new(at(&end), [7].into()).is_err());
    assert!(Reader::new(at("3|1|1|3:3:|"), [7].into()).is_err());
}
